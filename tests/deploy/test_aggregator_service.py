"""The aggregator as a service: its settings, what it refuses to start with, what it tells, what it survives."""

from __future__ import annotations

import configparser
import json
import logging
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.aggregator.canaries import Canaries, write_canaries
from deploy.aggregator.examiner import CanaryFolder, Examiner, read_references
from deploy.aggregator.gates import GateLimits
from deploy.aggregator.identity import file_name
from deploy.aggregator.notices import Notices
from deploy.aggregator.records import EventKind
from deploy.aggregator.service import Service
from deploy.aggregator.settings import AggregatorSettings, load_settings, settings_schema
from deploy.aggregator.store import Store
from edge import cli
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import Subscriber
from edge.alerts.topics import Kind
from edge.errors import DataError, SettingsError, StoreError, UsageError
from edge.federation.connection import LinkKind
from edge.federation.keys import certificate, make_keys
from edge.federation.update import FleetBank
from edge.inference.state import stored_state
from tests.edge.tiny_bundle import repack
from tests.edge.tiny_memory import make_memory_bundle
from tests.federation_link import EMBEDDING, PRODUCT, make_client, make_update
from tests.fleet_service import Aggregator, Opinion, Suspicious, wait_for

if TYPE_CHECKING:
    from edge.federation.update import MemoryUpdate
    from tests.mosquitto_process import Mosquitto

DEPLOY = Path(__file__).parents[2] / "deploy"
POOL = f"{EMBEDDING}/{PRODUCT}"


def test_example_is_accepted() -> None:
    settings = load_settings(DEPLOY / "aggregator.example.yaml")
    assert settings.rounds.fleet == "plants"
    assert settings.store.name == "aggregator.db"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lisen": "tcp://*:1"}, "lisen: unknown key; did you mean 'listen'"),
        ({"listen": "udp://*:1"}, "listen: not an address"),
        ({"listen": "tcp://*"}, "listen: not an address"),
        ({"rounds": {"fleet": "x", "close_at": 1, "min_boxes": 2}}, "min_boxes"),
        ({"rounds": {"fleet": "x", "perod_s": 1}}, "did you mean 'period_s'"),
        ({"merge": {"rows": 9000}}, "merge.rows"),
        ({"name": "a/b"}, "name"),
        ({"key_file": None}, "key_file"),
    ],
)
def test_wrong_settings_name_the_key_and_the_cure(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    aggregator = Aggregator(tmp_path, **change)
    with pytest.raises(SettingsError, match=words) as error:
        load_settings(aggregator.config)
    assert str(aggregator.config) in str(error.value)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    settings = Aggregator(tmp_path, canaries="canaries", broker={"ca_file": "ca.pem", "url": "mqtts://h:1"}).settings
    assert settings.boxes == tmp_path / "boxes"
    assert settings.canaries == tmp_path / "canaries"
    assert settings.broker is not None
    assert settings.broker.ca_file == tmp_path / "ca.pem"


def test_every_key_has_a_title_and_a_description() -> None:
    schema = json.loads(settings_schema())
    own = schema["properties"]
    assert set(own) == set(AggregatorSettings.model_fields)
    assert all(value.get("title") and value.get("description") for value in own.values())


def test_open_key_file_is_refused(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path)
    aggregator.settings.key_file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        Service(aggregator.settings).start()


def test_two_boxes_with_one_key_are_refused_at_the_start(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path)
    keys = make_keys()
    for box in ("plant/a", "plant/b"):
        (tmp_path / "boxes" / file_name(box)).write_text(certificate(keys.public))
    with pytest.raises(SettingsError, match="plant/a and plant/b have one key"):
        Service(aggregator.settings).start()


def test_address_in_use_is_refused_and_the_store_let_go(tmp_path: Path) -> None:
    with Aggregator(tmp_path / "one") as first:
        second = Aggregator(tmp_path / "two", listen=first.service.endpoint)
        with pytest.raises(SettingsError, match="listen"):
            Service(second.settings).start()
        second.values["listen"] = "tcp://127.0.0.1:0"
        second.write()
        with second:
            pass


def test_copied_key_puts_both_boxes_out_while_the_service_runs(tmp_path: Path) -> None:
    with Aggregator(tmp_path) as aggregator:
        keys = aggregator.enrol("plant/a")
        with aggregator.client(keys, "plant/a") as client:
            wait_for(client, lambda: client.state.kind is LinkKind.CONNECTED)
            (tmp_path / "boxes" / file_name("plant/b")).write_text(certificate(keys.public))
            wait_for(client, lambda: client.state.kind is LinkKind.REFUSED)
        aggregator.wait_for_event(lambda event: "plant/a and plant/b have one key" in event["text"])


def test_damaged_store_is_put_aside_and_the_service_goes_on(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path)
    with aggregator:
        keys = aggregator.enrol("plant/a")
        with aggregator.client(keys, "plant/a") as client:
            client.submit(make_update())
            wait_for(client, lambda: client.counters["receipts"] == 1)
    store = aggregator.settings.store
    content = bytearray(store.read_bytes())
    content[:100] = bytes(100)
    store.write_bytes(content)
    with aggregator:
        with aggregator.client(keys, "plant/a") as client:
            client.submit(make_update(seed=1))
            wait_for(client, lambda: client.counters["receipts"] == 1)
        shown = json.loads(aggregator.command("status", "--json"))
        assert [event["kind"] for event in shown["events"]].count("damage") == 1


class Slow:
    """A gate that takes until it is told to go on."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *_: object, **__: object) -> Opinion:
        self.began.set()
        assert self.go_on.wait(20)
        return Opinion()


def test_boxes_are_served_while_a_round_is_merged(tmp_path: Path) -> None:
    gate = Slow()
    rounds = {"fleet": "plants", "close_at": 1, "min_boxes": 1, "period_s": 60.0}
    aggregator = Aggregator(tmp_path, gate=gate, rounds=rounds)
    with aggregator, aggregator.client(aggregator.enrol("plant/a"), "plant/a") as client:
        client.submit(make_update())
        assert gate.began.wait(10)
        client.submit(make_update(seed=1, round=2))
        wait_for(client, lambda: client.counters["receipts"] == 2, 3)
        assert aggregator.service.merging
        assert client.counters["banks"] == 0
        began = time.monotonic()
        aggregator.stop()
        assert time.monotonic() - began < 3, "a merge does not hold the service up"
        gate.go_on.set()
        aggregator.start()
        wait_for(client, lambda: client.counters["bank_version"] == 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_service_ends_when_nobody_can_be_let_in_any_more(tmp_path: Path) -> None:
    """The thread at the door dies of a defect: no hang, neither before the end nor at it."""
    aggregator = Aggregator(tmp_path)
    service = Service(aggregator.settings)
    service.start()
    try:
        service.step()
        assert service.server is not None
        service.server._doorkeeper._boxes = lambda: 1 / 0
        with make_client(
            tmp_path, make_keys(), "plant/a", service.endpoint, server_key=aggregator.keys.public
        ):  # fmt: skip
            service.server._doorkeeper.thread.join(5)
        service._due["watchdog"] = 0
        with pytest.raises(StoreError, match="admits"):
            service.step()
    finally:
        ended = threading.Thread(target=service.stop, daemon=True)
        ended.start()
        ended.join(5)
    assert not ended.is_alive()


@pytest.mark.broker
def test_quarantine_and_stolen_name_become_notices(tmp_path: Path, mosquitto: Mosquitto) -> None:
    rounds = {"fleet": "plants", "close_at": 1, "min_boxes": 1, "period_s": 60.0}
    broker = {"url": mosquitto.url}
    aggregator = Aggregator(tmp_path, gate=Suspicious("plant/a"), rounds=rounds, broker=broker)
    with Subscriber(BrokerSettings(url=mosquitto.url), kinds={Kind.NOTICE}) as subscriber:
        subscriber.wait_until_ready(10)
        with aggregator:
            keys = aggregator.enrol("plant/a")
            with aggregator.client(keys, "plant/a") as client, aggregator.client(keys, "plant/b") as thief:
                client.submit(make_update())
                wait_for(thief, lambda: thief.state.kind is LinkKind.REFUSED)
                found = {}
                while len(found) < 2:
                    received = subscriber.receive(10)
                    assert received is not None
                    found[received.message.kind] = received.message
    held, stolen = found["federation.quarantine"], found["federation.security"]
    assert (held.severity.value, stolen.severity.value) == ("warning", "alarm")
    assert "it pulls canaries" in held.text
    assert stolen.detail["code"] == "stolen_name"
    assert (held.site, held.box, held.detail["box"]) == ("fleet", "aggregator", "plant/a")


def test_events_are_told_once_across_restarts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Aggregator(tmp_path).settings
    caplog.set_level(logging.INFO, "lineward.aggregator")
    with Store(settings.store) as store:
        notices = Notices(settings, store)
        store.add_event(EventKind.SECURITY, "first", box="plant/a")
        assert notices.look() == 1
        assert notices.look() == 0
        notices.close()
        store.add_event(EventKind.QUARANTINE, "second")
        again = Notices(settings, store)
        assert again.look() == 1
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [("ERROR", "security: box plant/a: first"), ("WARNING", "quarantine: second")]
    settings.store.unlink()
    with Store(settings.store) as store:
        store.add_event(EventKind.DAMAGE, "a new store counts from one")
        assert Notices(settings, store).look() == 1


def canaries(product: str = PRODUCT, *, seed: int = 0, shift: float = 20.0) -> Canaries:
    """Defects that lie ``shift`` away from what is good in every channel."""
    random = np.random.default_rng(seed)
    good = random.standard_normal((60, 8)).astype(np.float32)
    return Canaries(EMBEDDING, product, (good + np.float32(shift)).astype(np.float32), good, 3.0)


def test_canaries_are_read_again_when_their_folder_changes(tmp_path: Path) -> None:
    folder = CanaryFolder(tmp_path)
    assert folder.find(EMBEDDING, PRODUCT) is None
    write_canaries(tmp_path / "all.npz", canaries("", seed=1))
    assert folder.find(EMBEDDING, PRODUCT) is not None
    write_canaries(tmp_path / "own.npz", canaries(seed=2))
    found = folder.find(EMBEDDING, PRODUCT)
    assert found is not None
    assert found.product == PRODUCT
    assert folder.find("cd" * 32, PRODUCT) is None
    other = folder.find(EMBEDDING, "another")
    assert other is not None
    assert other.product == ""


def test_damaged_canaries_leave_the_former_in_force(tmp_path: Path) -> None:
    write_canaries(tmp_path / "own.npz", canaries())
    folder = CanaryFolder(tmp_path)
    (tmp_path / "own.npz").write_bytes(b"damaged")
    assert folder.find(EMBEDDING, PRODUCT) is not None
    assert "own.npz" in folder.trouble
    with pytest.raises(DataError, match=r"own\.npz"):
        CanaryFolder(tmp_path)


def test_two_canary_files_for_one_product_are_refused(tmp_path: Path) -> None:
    for name in ("one.npz", "two.npz"):
        write_canaries(tmp_path / name, canaries())
    with pytest.raises(DataError, match="second file"):
        CanaryFolder(tmp_path)


def test_missing_canary_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        CanaryFolder(tmp_path / "none")


def update_with(box: str, product: str, shift: float) -> MemoryUpdate:
    """An update half of whose rows lie ``shift`` away from what is good."""
    update = make_update(box, product=product, rows=64, seed=hash_of(box))
    rows = update.rows.copy()
    rows[32:] += np.float32(shift)
    return replace(update, rows=rows.astype(np.float16).astype(np.float32))


def hash_of(box: str) -> int:
    return sum(box.encode())


def test_examiner_tries_each_update_on_its_products_canaries(tmp_path: Path) -> None:
    """Boxes that send the canaries' defects as good are held back; the others, of both products, pass."""
    write_canaries(tmp_path / "own.npz", canaries())
    write_canaries(tmp_path / "other.npz", canaries("other", seed=1, shift=-20))
    examiner = Examiner(GateLimits(), CanaryFolder(tmp_path))
    updates = [
        update_with("plant/a", PRODUCT, 0),
        update_with("plant/bad", PRODUCT, 20),
        update_with("plant/c", "other", 0),
        update_with("plant/worse", "other", -20),
    ]
    found = examiner.examine_all(updates, reference=None, first=4)
    assert [one.accepted for one in found] == [True, False, True, False], [one.reasons for one in found]
    assert all("canar" in " ".join(found[number].reasons) for number in (1, 3))
    again = examiner.examine_all(updates[::-1], reference=None, first=2)
    assert [one.accepted for one in again] == [False, True]


def test_examiner_says_once_that_it_has_no_canaries(caplog: pytest.LogCaptureFixture) -> None:
    nobody = Examiner(GateLimits(), CanaryFolder(None))
    for _ in range(2):
        nobody.examine_all([update_with("plant/a", PRODUCT, 0)], reference=None, first=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"product {PRODUCT} of {EMBEDDING[:12]}: no canaries could be tried; add a canary file"
    ]


def test_reference_is_the_memory_of_a_bundle_that_has_one(tmp_path: Path) -> None:
    bundle = make_memory_bundle(tmp_path / "bundle", commissioning=0)
    found = read_references([bundle.path])
    assert set(found) == set(bundle.manifest.embedding_id.values())
    layout = bundle.manifest.memory
    assert layout is not None
    packed = np.unique(stored_state(bundle)[layout.local], axis=0)
    for bank in found.values():
        assert {row.tobytes() for row in packed} <= {row.tobytes() for row in bank.rows}
        assert bank.support.sum() == pytest.approx(1)
    fixed = repack(bundle, memory=None)
    with pytest.raises(DataError, match="feddymem"):
        read_references([fixed.path])


def test_what_a_revoked_box_had_sent_waits_for_a_person(tmp_path: Path) -> None:
    with Aggregator(tmp_path) as aggregator:
        clients = {box: aggregator.client(aggregator.enrol(box), box) for box in ("plant/a", "plant/b")}
        for client in clients.values():
            client.start()
        clients["plant/a"].submit(make_update("plant/a", rows=40))
        wait_for(clients["plant/a"], lambda: clients["plant/a"].counters["receipts"] == 1)
        aggregator.command("revoke", "plant/a")
        wait_for(clients["plant/a"], lambda: clients["plant/a"].state.kind is LinkKind.REFUSED)
        clients["plant/b"].submit(make_update("plant/b", rows=40, seed=1))
        wait_for(clients["plant/b"], lambda: clients["plant/b"].counters["banks"] == 1)
        bank = clients["plant/b"].poll_bank()
        assert bank is not None
        assert bank.members == ("plant/b",)
        assert "was taken back" in aggregator.command("quarantine", "list")
        for client in clients.values():
            client.stop()


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (("revoke", "plant/none"), SettingsError, "has no key"),
        (("enrol", "plant/a", "--public", "/nonexistent.key"), SettingsError, "cannot be read"),
        (("rollback", POOL, "1"), StoreError, "there is none"),
        (("quarantine", "release", "1"), StoreError, "there is none"),
    ],
)
def test_commands_say_what_is_wrong(tmp_path: Path, words: tuple[str, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Aggregator(tmp_path).command(*words)


def test_commands_on_a_store_name_what_there_is(tmp_path: Path) -> None:
    with Aggregator(tmp_path) as aggregator:
        with pytest.raises(UsageError, match="not quarantined"):
            aggregator.command("quarantine", "dismiss", "7")
        with pytest.raises(UsageError, match="no bank 4"):
            aggregator.command("rollback", "no-such-pool", "4")
        assert "0 boxes enrolled" in aggregator.command("status")


def test_enrolling_another_boxes_file_is_refused(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path)
    public = tmp_path / "box.key"
    public.write_text(certificate(make_keys().public, box="plant/b"))
    with pytest.raises(UsageError, match="is the key of plant/b"):
        aggregator.command("enrol", "plant/a", "--public", str(public))


def test_dismissed_update_is_gone(tmp_path: Path) -> None:
    rounds = {"fleet": "plants", "close_at": 1, "min_boxes": 1, "period_s": 60.0}
    with Aggregator(tmp_path, gate=Suspicious("plant/a"), rounds=rounds) as aggregator:
        with aggregator.client(aggregator.enrol("plant/a"), "plant/a") as client:
            client.submit(make_update())
            wait_for(client, lambda: client.round == 2)
            deadline = time.monotonic() + 5
            while "plant/a" not in (held := aggregator.command("quarantine", "list")):
                assert time.monotonic() < deadline
        assert "refused" in aggregator.command("quarantine", "dismiss", held.split()[0])
        assert aggregator.command("quarantine", "list").strip() == "none"


@pytest.mark.parametrize("name", ["lineward-aggregator", "lineward-box"])
def test_unit_starts_a_verb_that_exists(name: str, tmp_path: Path) -> None:
    unit = DEPLOY / "systemd" / f"{name}.service"
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys of units have capitals
    parser.read(unit)
    service = parser["Service"]
    assert service["Type"] == "notify"
    assert float(service["WatchdogSec"]) >= 20
    program, *words, config = service["ExecStart"].split()
    assert program.endswith("/bin/lineward")
    assert config.endswith(".yaml")
    said = CliRunner().invoke(cli.app, [*words[:-1], "--help"], catch_exceptions=False).output
    assert words[-1] in said
    analyse = shutil.which("systemd-analyze")
    if analyse is not None:
        # The program of the unit need not be on this machine.
        copy = tmp_path / unit.name
        copy.write_text(unit.read_text().replace(program, "/bin/true"))
        found = subprocess.run([analyse, "verify", str(copy)], capture_output=True, text=True, check=False)
        assert str(copy) not in found.stderr, found.stderr


def test_banks_are_real(tmp_path: Path) -> None:
    """With the gates of the settings, no stand-in: two boxes make a bank."""
    with Aggregator(tmp_path) as aggregator:
        clients = [aggregator.client(aggregator.enrol(box), box) for box in ("plant/a", "plant/b")]
        for number, client in enumerate(clients):
            client.start()
            client.submit(make_update(("plant/a", "plant/b")[number], rows=40, seed=number))
        for client in clients:
            wait_for(client, lambda client=client: client.counters["banks"] == 1)
            assert isinstance(client.poll_bank(), FleetBank)
            client.stop()
