"""What a whole box keeps to itself: secrets out of logs and messages, files from others, sockets from everybody."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import cv2
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.alerts.commander import Commander
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.errors import SettingsError
from edge.settings import load_settings
from tests.certificates import Authority
from tests.edge.tiny_bundle import defective_frame, make_tiny_bundle
from tests.mosquitto_process import Mosquitto, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.certificates import Pair

pytestmark = pytest.mark.broker
ROOT = Path(__file__).parents[2]
LINEWARD = [str(Path(sys.executable).parent / "lineward")]
SOON = 40.0
# As people choose them: with what a URL must write in another way, and with blanks.
BROKER_WORD, CAMERA_WORD = "br0ker pass/word%42", "c4mera:p@ss#w0rd"
OFFLINE_CORE = [
    "tests/edge/test_publisher.py", "tests/edge/test_publisher_commands.py", "tests/end_to_end/test_box.py",
    "tests/end_to_end/test_home_assistant.py",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny").path


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.png"), defective_frame(number))
    return folder


class Guarded:
    """A box whose broker wants TLS, a certificate and a password, and whose camera has a login: every secret in one."""

    def __init__(self, folder: Path, bundle: Path, frames: Path) -> None:
        self.folder, self.frames = folder, frames
        authority = Authority(folder / "ca")
        self.pair: Pair = authority.issue("plant/box1")
        server = authority.issue("broker")
        self.port = free_port()
        broker_folder = folder / "broker"
        broker_folder.mkdir()
        lines = [f"listener {self.port} 127.0.0.1", f"cafile {authority.cert}", f"certfile {server.cert}",
                 f"keyfile {server.key}", "require_certificate true"]  # fmt: skip
        self.broker = Mosquitto(broker_folder, users={"plant/box1": BROKER_WORD}, extra="\n".join(lines))
        self.password = folder / "broker.password"
        self.password.touch(mode=0o600)
        self.password.write_text(BROKER_WORD)
        self.access = {
            "url": f"mqtts://localhost:{self.port}", "username": "plant/box1", "password_file": str(self.password),
            "ca_file": str(authority.cert), "cert_file": str(self.pair.cert), "key_file": str(self.pair.key),
            "backoff_min_s": 0.1, "backoff_max_s": 0.3,
        }  # fmt: skip
        # Nobody answers there, and the camera's name is part of the error.
        camera = f"rtsp://viewer:{quote(CAMERA_WORD, safe='')}@127.0.0.1:{free_port()}/stream"
        self.content: dict[str, Any] = {
            "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle), "threads": 1,
            "engine": "onnxruntime", "status_every_s": 0.5, "broker": self.access,
            "evidence": {}, "metrics": {"port": free_port()},
            "cameras": [
                {"name": "cam", "source": {"kind": "folder", "path": str(frames), "loop": True, "fps": 20}},
                {"name": "locked", "source": {"kind": "camera", "url": camera}},
            ],
        }  # fmt: skip
        self.config = folder / "box.yaml"
        self.write()

    @property
    def secrets(self) -> dict[str, str]:
        """Every way in which a secret may be written, by what it is."""
        key = self.pair.key.read_text().splitlines()[1]
        found = {"key": key}
        for name, word in (("broker", BROKER_WORD), ("camera", CAMERA_WORD)):
            found |= {f"{name} as it is": word, f"{name} in a URL": quote(word, safe=""),
                      f"{name} in JSON": word.replace("/", "\\/"),
                      f"{name} in base64": base64.b64encode(word.encode()).decode().rstrip("=")}  # fmt: skip
        login = base64.b64encode(f"viewer:{CAMERA_WORD}".encode()).decode().rstrip("=")
        return found | {"camera's login in base64": login}

    def write(self) -> None:
        self.config.write_text(yaml.safe_dump(self.content))

    def leaks(self, text: str) -> list[str]:
        return [name for name, secret in self.secrets.items() if secret in text]


@pytest.fixture
def guarded(tmp_path: Path, bundle: Path, frames: Path) -> Iterator[Guarded]:
    box = Guarded(tmp_path, bundle, frames)
    yield box
    box.broker.stop()


def run_box(config: Path, log: Path, *options: str, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [*before, *LINEWARD, "run", "--config", str(config), *options], stderr=file, stdout=file, umask=0
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    if process.poll() is None:
        process.kill()
        process.wait()


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for what another process does: a file, a line of its log."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_leaves_a_box_whatever_goes_wrong(guarded: Guarded, tmp_path: Path, form: str) -> None:
    log = tmp_path / "box.log"
    # First the broker is away, then it wants another password, then all is well.
    box = run_box(guarded.config, log, "--verbose", "--log-format", form)
    published: list[str] = []
    try:
        until(lambda: "running at this address" in log.read_text(), box, log)
        guarded.broker.set_password("plant/box1", "another")
        guarded.broker.start()
        until(lambda: "password_file" in log.read_text(), box, log)
        guarded.broker.set_password("plant/box1", BROKER_WORD)
        guarded.broker.restart()
        access = BrokerSettings.model_validate(guarded.access)
        with Subscriber(access, kinds=EVERYTHING) as subscriber, Commander(access, site="plant", box="box1") as asker:
            subscriber.wait_until_ready(SOON)
            topics: set[str] = set()
            while not {"alert", "state", "status"} <= topics:
                received = subscriber.receive(SOON)
                assert received is not None, topics
                topics.add(received.topic.rpartition("/")[2])
                published.append(received.payload.decode())
            published.append(asker.ask("dead_letters", {}).model_dump_json())
            until(lambda: re.search(r"camera.*locked|locked.*camera", log.read_text()), box, log)
            received = subscriber.receive(SOON)
            while received is not None and "/status" not in received.topic:
                received = subscriber.receive(SOON)
            assert received is not None
            published.append(received.payload.decode())
        guarded.content["broker"] = guarded.access | {"keepalive_s": 33}
        guarded.write()
        box.send_signal(signal.SIGHUP)  # refused, and said
        until(lambda: "broker: cannot change" in log.read_text(), box, log)
    finally:
        stop(box)
    text = log.read_text()
    assert "127.0.0.1" in text, "the camera that cannot be reached is named"
    assert guarded.leaks(text) == []
    assert guarded.leaks("\n".join(published)) == []
    kept = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert guarded.leaks(kept.decode("latin-1")) == []


def test_scan_finds_a_secret(guarded: Guarded) -> None:
    assert guarded.leaks(f"cannot open rtsp://viewer:{quote(CAMERA_WORD, safe='')}@host") == ["camera in a URL"]
    assert guarded.leaks(guarded.pair.key.read_text()) == ["key"]
    assert guarded.leaks("cannot open rtsp://viewer:***@host") == []


def test_broken_settings_file_repeats_no_secret(guarded: Guarded, tmp_path: Path) -> None:
    word = BROKER_WORD
    for broken in (
        {"broker": {"url": f"mqtt://box:{quote(word, safe='')}@localhost"}},
        {"broker": guarded.access | {"password": word}},
        {"broker": guarded.access | {"username": [word]}},
        {"broker": word},
        {"cameras": [{"name": "cam", "source": {"kind": "camera", "url": word}}]},
    ):
        (tmp_path / "broken.yaml").write_text(yaml.safe_dump(guarded.content | broken))
        with pytest.raises(SettingsError) as caught:
            load_settings(tmp_path / "broken.yaml")
        assert guarded.leaks(str(caught.value)) == [], broken
        assert word not in str(caught.value)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**6) | st.floats() | st.text(max_size=12) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["site", "box", "state_dir", "bundle", "broker", "cameras", "stations", "evidence", "metrics", "modbus",
        "memory", "federation", "engine", "threads", "outbox_max_mb", "engine_stall_s"]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), YAML_VALUES, max_size=4), deep=st.tuples(st.text(), YAML_VALUES))
def test_any_settings_are_taken_or_refused_by_name(
    guarded_content: dict[str, Any], tmp_path: Path, changes: dict[str, Any], deep: tuple[str, Any]
) -> None:
    content = guarded_content | changes
    if isinstance(content["cameras"], list) and len(changes) % 2:
        content["cameras"] = [guarded_content["cameras"][0] | {deep[0]: deep[1]}]
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with contextlib.suppress(SettingsError):
        load_settings(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_any_bytes_are_no_settings_but_a_typed_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    with contextlib.suppress(SettingsError):
        load_settings(path)


@pytest.fixture
def guarded_content(tmp_path: Path) -> dict[str, Any]:
    camera = {"name": "cam", "source": {"kind": "folder", "path": str(tmp_path)}}
    return {"site": "plant", "box": "box1", "state_dir": "state", "bundle": "b", "cameras": [camera]}


def test_files_of_a_box_are_not_for_others(guarded: Guarded, tmp_path: Path) -> None:
    guarded.broker.start()
    log = tmp_path / "box.log"
    box = run_box(guarded.config, log)  # with umask 0: what a careless shell hands on
    state = tmp_path / "state"
    try:
        until(lambda: (state / "outbox.db").exists() and list((state / "evidence").rglob("*.*")), box, log)
    finally:
        stop(box)
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.lstat().st_mode) for path in [state, *state.rglob("*")]}
    assert len(modes) > 4
    assert {str(path): oct(mode) for path, mode in modes.items() if mode & 0o027} == {}


def test_box_connects_to_its_broker_and_to_nothing_else(guarded: Guarded, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace on the path to watch connections with: apt-get install strace")
    guarded.broker.start()
    guarded.content["cameras"].pop()
    guarded.write()
    trace, log = tmp_path / "trace", tmp_path / "box.log"
    calls = "trace=connect,sendto,sendmsg,sendmmsg,getsockname"
    box = run_box(guarded.config, log, before=(strace, "-f", "-qq", "-e", calls, "-s", "0", "-o", str(trace)))
    access = BrokerSettings.model_validate(guarded.access)
    try:
        with Subscriber(access) as subscriber:
            subscriber.wait_until_ready(SOON)
            assert subscriber.receive(SOON) is not None, "it works"
    finally:
        # strace hands the signal on to nobody: the box is its child.
        children = Path(f"/proc/{box.pid}/task/{box.pid}/children").read_text().split()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            box.wait(20)
        stop(box)
    family = re.compile(r"sa_family=AF_INET6?, sin6?_port=htons\((\d+)\).*?\"([0-9a-f.:]+)\"")
    own, targets = set(), set()
    for line in trace.read_text().splitlines():
        if (found := family.search(line)) is not None:
            # paho wakes its thread over a pair of sockets, made by listening and connecting to itself.
            (own if "getsockname(" in line else targets).add((found[2], int(found[1])))
    # Port 0 is how getaddrinfo(3) asks the kernel for the way to an address; nothing is sent by it.
    targets = {(host, port) for host, port in targets - own if port}
    assert targets <= {("127.0.0.1", guarded.port), ("::1", guarded.port)}, targets
    assert ("127.0.0.1", guarded.port) in targets


@pytest.mark.slow
def test_core_of_the_suite_passes_without_a_network() -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces on this machine (unshare -rn)")
    done = subprocess.run(
        [sys.executable, "tests/offline.py", "-q", "-m", "not slow", *OFFLINE_CORE],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
