"""The apps on Flower's own messages inside one process: what a box gives, gets and cannot forge.

Runs in the environment of the extra ``flower``: ``make flower-test``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomllib

flwr = pytest.importorskip("flwr", reason="flwr is not in this environment: run `make flower-test`")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from deploy.flower import records, server  # noqa: E402
from deploy.flower.client import app, make_client_app  # noqa: E402
from deploy.flower.exchange import FolderExchange, Invitation, Outcome  # noqa: E402
from deploy.flower.grid import GridFleet  # noqa: E402
from deploy.flower.quiet import QUIET  # noqa: E402
from deploy.flower.records import Told  # noqa: E402
from deploy.flower.rounds import Answered, Failed, Kept  # noqa: E402
from deploy.flower.server import main, read_run_config, run_rounds  # noqa: E402
from edge.errors import DataError, FederationError, SettingsError  # noqa: E402
from edge.federation.folder_link import BANK, OUTCOME, UPDATE  # noqa: E402
from edge.federation.refusals import Refusal  # noqa: E402
from edge.federation.wire import encode_bank, encode_update  # noqa: E402
from tests.deploy.fleet_contract import (  # noqa: E402
    BOXES,
    FleetContract,
    Verdict,
    decoded,
    given,
    keep_books,
    settings_text,
    updates_of,
)
from tests.edge.federation_values import bank, update  # noqa: E402

INVITATION = Invitation("plant", {"ab" * 32: 1}, 10_000)
OUTCOMES = [
    None,
    Outcome("ab" * 32, counted_in_round=3),
    Outcome("cd" * 32, refused=Refusal.STALE_ROUND, reason="closed"),
]


def be_quiet(patch, home):
    for name, value in {**QUIET, "FLWR_HOME": str(home)}.items():
        patch.setenv(name, value)
    # What Flower's own process sets before it calls an app.
    for name in ("_task_id", "_run_id", "_node_id"):
        patch.setattr(TaskIdentity, name, 1)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    be_quiet(monkeypatch, tmp_path)


class LocalGrid:
    """Carries messages to ClientApps in this process, as SuperLink and SuperNode do between processes."""

    def __init__(self, nodes, *, status="online"):
        self.nodes = [
            SimpleNamespace(node_id=number, name=name, status=status) for number, name in enumerate(nodes, start=1)
        ]
        self.apps, self.contexts, self.waiting, self.sent = {}, {}, {}, []
        self.takes = True

    def get_nodes(self):
        return self.nodes

    def push_messages(self, messages):
        for message in messages:
            if not self.takes:
                yield None
                continue
            identity = message.object_id
            message.metadata.__dict__["_message_id"] = identity
            self.sent.append(message)
            self.waiting[identity] = self.answer(message)
            yield identity

    def answer(self, message):
        node = message.metadata.dst_node_id
        if node not in self.apps:
            return None
        try:
            return self.apps[node](message, self.contexts[node])
        except Exception as error:  # noqa: BLE001 (so does a SuperNode)
            return Message(Error(code=2, reason=str(error)), reply_to=message)

    def pull_messages(self, identities):
        return [reply for name in identities if (reply := self.waiting.pop(name, None)) is not None]

    def add(self, node, client, folder):
        self.apps[node] = client
        self.contexts[node] = Context(1, node, {"exchange": str(folder)}, RecordDict(), {})


@pytest.fixture
def box(tmp_path):
    folder = tmp_path / "box"
    folder.mkdir()
    return folder


@pytest.fixture
def grid(box):
    made = LocalGrid(["north/one"])
    made.add(1, app, box)
    return made


@pytest.fixture
def fleet(grid):
    made = GridFleet(grid, ttl_s=60)
    made.online()
    return made


def test_update_travels_as_the_bytes_of_the_other_transport(fleet, box):
    data = encode_update(update())
    (box / UPDATE).write_bytes(data)

    fleet.ask("north/one", INVITATION)

    assert fleet.poll() == [Answered("north/one", data)]
    assert fleet.poll() == []


def test_box_without_update_says_so(fleet):
    fleet.ask("north/one", INVITATION)

    assert fleet.poll() == [Answered("north/one", None)]


def test_bank_and_outcome_reach_the_box(fleet, box):
    data = encode_bank(bank(version=4))

    fleet.tell("north/one", OUTCOMES[2], data)

    assert fleet.poll() == [Kept("north/one", 4)]
    assert (box / BANK).read_bytes() == data
    assert "stale_round" in (box / OUTCOME).read_text()


def test_message_comes_twice_and_changes_nothing(grid, fleet, box):
    data = encode_bank(bank(version=4))
    fleet.tell("north/one", OUTCOMES[1], data)
    before = {path.name: path.read_bytes() for path in box.iterdir()}

    reply = grid.answer(grid.sent[0])

    assert records.read_kept(reply.content) == 4
    assert {path.name: path.read_bytes() for path in box.iterdir()} == before


def test_damaged_bank_is_not_kept_and_the_reason_comes_back(fleet, box):
    fleet.tell("north/one", None, b"LNWB and rubbish")

    (event,) = fleet.poll()

    assert isinstance(event, Failed)
    assert not (box / BANK).exists()


def test_box_side_may_be_any_callable(grid, fleet, tmp_path):
    seen = []

    class Live(FolderExchange):
        def update(self, invitation):
            seen.append(invitation)
            return b"made now"

    grid.add(1, make_client_app(lambda _: Live(tmp_path)), tmp_path)
    fleet.ask("north/one", INVITATION)

    assert fleet.poll() == [Answered("north/one", b"made now")]
    assert seen == [INVITATION]


@pytest.mark.parametrize("name", [*QUIET, "FLWR_HOME"])
def test_box_gives_nothing_where_flower_may_call_home(monkeypatch, fleet, box, name):
    (box / UPDATE).write_bytes(encode_update(update()))
    monkeypatch.delenv(name)

    fleet.ask("north/one", INVITATION)
    (event,) = fleet.poll()

    assert isinstance(event, Failed)
    assert name in event.reason


def test_node_without_folder_is_told_how_to_start():
    context = Context(1, 1, {}, RecordDict(), {})
    with pytest.raises(DataError, match="--node-config"):
        app(Message(records.ask(INVITATION, ticket="t"), dst_node_id=1, message_type=records.ASK), context)


def test_only_nodes_registered_under_one_box_name_are_asked():
    grid = LocalGrid(["", "no box name", "north/twice", "north/twice", "north/one"])

    assert GridFleet(grid, ttl_s=60).online() == ["north/one"]


def test_offline_node_is_not_asked():
    fleet = GridFleet(LocalGrid(["north/one"], status="offline"), ttl_s=60)

    assert fleet.online() == []
    fleet.ask("north/one", INVITATION)
    assert fleet.poll() == [Failed("north/one", "went offline")]


def test_message_that_superlink_does_not_take_is_reported(grid, fleet):
    grid.takes = False

    fleet.tell("north/one", OUTCOMES[1], None)

    assert fleet.poll() == [Failed("north/one", "SuperLink did not take the message")]


def forged(message, content=None):
    return Message(content or records.answer(b"forged", ticket="0" * 32), reply_to=message)


@pytest.mark.parametrize(
    "content",
    [
        records.answer(b"forged", ticket="0" * 32),
        records.answer(b"forged", ticket="ö"),
        RecordDict(),
        RecordDict({"lineward": ConfigRecord({"ticket": 5})}),
    ],
    ids=["wrong ticket", "ticket not ASCII", "no record", "ticket of another type"],
)
def test_reply_without_the_ticket_of_the_question_counts_for_nobody(grid, fleet, content):
    grid.answer = lambda message: forged(message, content)

    fleet.ask("north/one", INVITATION)
    (event,) = fleet.poll()

    assert isinstance(event, Failed)


def test_reply_of_another_node_counts_for_nobody(grid, fleet):
    def answer(message):
        reply = forged(message, records.answer(b"forged", ticket=records.read_ticket(message.content)))
        reply.metadata.__dict__["_src_node_id"] = 99
        return reply

    grid.answer = answer
    fleet.ask("north/one", INVITATION)
    (event,) = fleet.poll()

    assert isinstance(event, Failed)
    assert "not by the node" in event.reason


def test_reply_that_nobody_waits_for_is_left_alone(grid, fleet):
    fleet.ask("north/one", INVITATION)
    (reply,) = grid.waiting.values()
    grid.pull_messages = lambda _: [reply, reply]

    assert fleet.poll() == [Answered("north/one", None)]


def test_tickets_differ_from_message_to_message(grid, fleet):
    for _ in range(3):
        fleet.ask("north/one", INVITATION)

    assert len({records.read_ticket(message.content) for message in grid.sent}) == 3


@pytest.mark.parametrize("outcome", OUTCOMES, ids=["none", "counted", "refused"])
@pytest.mark.parametrize("data", [None, b"", b"bank"], ids=["no bank", "empty", "bank"])
def test_told_is_read_as_it_was_written(outcome, data):
    assert records.read_tell(records.tell(Told(outcome, data), ticket="t")) == Told(outcome, data)


def test_refusal_of_a_later_version_is_read_as_other():
    content = records.tell(Told(OUTCOMES[2], None), ticket="t")
    content["lineward"]["refused"] = "not known yet"

    assert records.read_tell(content).outcome.refused is Refusal.OTHER


@pytest.mark.parametrize("name", ["fleet", "max_update_bytes"])
@pytest.mark.parametrize("value", [None, b"", 1.5, True, [1]])
def test_question_of_other_fields_is_malformed(name, value):
    content = records.ask(INVITATION, ticket="t")
    if value is None:
        del content["lineward"][name]
    else:
        content["lineward"][name] = value

    with pytest.raises(FederationError) as caught:
        records.read_ask(content)

    assert caught.value.code is Refusal.MALFORMED


class InProcess:
    """The ServerApp and the ClientApps of three boxes in this process; each step is one run."""

    def __init__(self, folder):
        self.folder = folder
        self.grid = LocalGrid(BOXES)
        for node, name in enumerate(BOXES, start=1):
            (folder / name).mkdir(parents=True)
            self.grid.add(node, app, folder / name)
        (folder / "aggregator.yaml").write_text(settings_text(folder, period_s=2))

    @property
    def config(self):
        values = {"settings": str(self.folder / "aggregator.yaml"), "answer-seconds": 1.0, "tell-seconds": 10.0}
        return {**values, "poll-seconds": 0.02}

    def hand_over(self, given):
        for name in BOXES:
            path = self.folder / name / UPDATE
            path.unlink(missing_ok=True)
            if name in given:
                path.write_bytes(given[name].payload)
        run_rounds(self.grid, read_run_config(self.config))
        return {name: self.verdict(name) for name in given}

    def verdict(self, name):
        outcome = json.loads((self.folder / name / OUTCOME).read_text())
        return Verdict(outcome["counted_in_round"], Refusal(outcome["refused"]) if outcome["refused"] else None)

    def bank(self, name, version):
        data = (self.folder / name / BANK).read_bytes()
        assert decoded(data).version == version
        return data


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("fleet")
        be_quiet(patch, folder)
        return keep_books(InProcess(folder))


class TestInProcess(FleetContract):
    """All of the contract."""


def test_box_that_names_another_is_refused(tmp_path):
    transport = InProcess(tmp_path)

    verdicts = transport.hand_over({BOXES[0]: given(updates_of(BOXES[1], 1, 1))})

    assert verdicts == {BOXES[0]: Verdict(0, Refusal.STOLEN_NAME)}


def test_bytes_that_are_no_update_are_refused(tmp_path):
    transport, one = InProcess(tmp_path), given(updates_of(BOXES[0], 1, 1))

    verdicts = transport.hand_over({BOXES[0]: replace(one, payload=b"rubbish")})

    assert verdicts == {BOXES[0]: Verdict(0, Refusal.MALFORMED)}


@pytest.mark.parametrize(
    "values", [{}, {"settings": ""}, {"settings": "a", "rounds": 0}, {"settings": "a", "other": 1}]
)
def test_run_configuration_out_of_range_is_refused(values):
    with pytest.raises(SettingsError, match="--run-config"):
        read_run_config(values)


def test_defaults_of_the_app_are_accepted():
    config = tomllib.loads((Path(server.__file__).parent / "app" / "pyproject.toml").read_text())
    given = config["tool"]["flwr"]["app"]["config"]

    read = read_run_config({**given, "settings": "/etc/lineward/aggregator.yaml"})

    assert read.model_dump(by_alias=True) == {**given, "settings": "/etc/lineward/aggregator.yaml"}


def test_aggregator_does_not_run_where_flower_may_call_home(monkeypatch):
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")

    with pytest.raises(SettingsError, match="FLWR_TELEMETRY_ENABLED"):
        main(LocalGrid([]), Context(1, 1, {}, RecordDict(), {}))
