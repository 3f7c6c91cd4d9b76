"""How long does a box take to judge the next product, from the word that it runs to the first frame judged as it?

One camera, a bundle for several products, a real mosquitto and a Modbus client by turns. The time in which the camera
has no new frame to give is taken off. Takes two minutes, and as long as training before it without `--bundle`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from pymodbus.client import ModbusTcpClient

from benchmarks._setting import Goal, heading, print_goals, spread
from edge.alerts.commander import Commander
from edge.alerts.settings import BrokerSettings
from edge.box import Box
from edge.bundle import Bundle, load_arrays
from edge.frames import Decision
from edge.inspection.registers import RECIPE_WRITTEN, TRIGGER_BASE
from edge.settings import BoxSettings
from tests.mosquitto_process import Mosquitto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from edge.frames import Verdict

GOAL_MS = 50.0
# Slow enough that no frame waits for the one before it.
FPS = 10.0
PATIENCE_S = 30.0
_MS = 1e6
CAMERA = "cam"


@dataclass
class Heard:
    """Verdicts with the moment at which each was there; any thread."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    verdicts: list[tuple[int, Verdict]] = field(default_factory=list)

    def take(self, _name: str, verdict: Verdict) -> None:
        """Note one; in the camera's thread."""
        with self.changed:
            self.verdicts.append((time.monotonic_ns(), verdict))
            self.changed.notify_all()

    def first(self, product: str, since_ns: int) -> tuple[int, Verdict]:
        """Wait for the first frame captured since a moment that was judged as a product."""

        def found() -> tuple[int, Verdict] | None:
            return next(
                (
                    (at, one)
                    for at, one in self.verdicts
                    if one.captured_ns >= since_ns
                    and one.subclass == product
                    and one.decision is not Decision.NOT_JUDGED
                ),
                None,
            )

        with self.changed:
            if not self.changed.wait_for(lambda: found() is not None, PATIENCE_S):
                raise SystemExit(f"no frame was judged as {product} within {PATIENCE_S:g} s")
            first = found()
            self.verdicts.clear()
        assert first is not None
        return first


@dataclass
class Switches:
    """Milliseconds of each switch.

    Attributes:
        holds: from the word to the moment from which frames are judged as the new product.
        judged: from the capture of the first such frame to its verdict.
        told: from the word to its acknowledgement.
        usual: from the capture of a frame to its verdict, without any switch.
    """

    holds: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)

    @property
    def whole(self) -> list[float]:
        """Without the wait for a frame."""
        return [one + other for one, other in zip(self.holds, self.judged, strict=True)]


def measure(box: Box, heard: Heard, say: Callable[[str], None], products: Sequence[str], rounds: int) -> Switches:
    """Switch products by turns.

    Args:
        box: that runs.
        heard: its verdicts.
        say: what runs, and returns once the box has acknowledged it.
        products: by turns.
        rounds: switches.
    """
    found = Switches()
    assert box._contents.recipes is not None  # noqa: SLF001 (the moment from which a recipe holds is no one else's)
    history = box._contents._book.history(CAMERA)  # noqa: SLF001 (as above)
    for index in range(rounds):
        before = history.now
        product = products[(products.index(before) + 1) % len(products) if before else 0]
        # Not in step with the camera, and a frame or two that are judged as ever.
        time.sleep((1 + index * 0.618 % 1) / FPS)
        with heard.changed:
            found.usual += [(at - one.captured_ns) / _MS for at, one in heard.verdicts if at > one.captured_ns]
            heard.verdicts.clear()
        said_ns = time.monotonic_ns()
        say(product)
        told_ns = time.monotonic_ns()
        since_ns = history.set(product)
        if not said_ns <= since_ns <= told_ns:
            raise SystemExit(f"{product} was acknowledged before it held, or did not hold")
        at_ns, verdict = heard.first(product, since_ns)
        found.holds.append((since_ns - said_ns) / _MS)
        found.judged.append((at_ns - verdict.captured_ns) / _MS)
        found.told.append((told_ns - said_ns) / _MS)
        box.supervise()
    return found


@contextmanager
def running(bundle: Bundle, folder: Path, url: str) -> Iterator[tuple[Box, Heard]]:
    """A box with one camera that shows all products by turns."""
    arrays = load_arrays(bundle.file(bundle.manifest.golden.file))
    (folder / "frames").mkdir()
    good = [int(np.flatnonzero(arrays["product"] == index)[0]) for index in range(len(bundle.manifest.products))]
    for index, place in enumerate(good):
        image = cv2.cvtColor(arrays["canvas"][place], cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / "frames" / f"{index:03d}.png"), image)
    source = {"kind": "folder", "path": str(folder / "frames"), "loop": True, "fps": FPS, "policy": "drop_oldest"}
    settings = BoxSettings.model_validate(
        {
            "site": "plant", "box": "box1", "state_dir": folder / "state", "bundle": bundle.path,
            "broker": {"url": url}, "modbus": {"port": 0},
            "cameras": [{"name": CAMERA, "mode": "triggered", "source": source}],
        }
    )  # fmt: skip
    heard = Heard()
    box = Box(settings, on_verdict=heard.take)
    box.start()
    try:
        box.supervise()
        yield box, heard
    finally:
        box.stop()


def by_mqtt(commander: Commander) -> Callable[[str], None]:
    """Say what runs over MQTT."""

    def say(product: str) -> None:
        answer = commander.ask("recipe", {"recipe": product}, timeout=PATIENCE_S)
        if not answer.ok:
            raise SystemExit(f"recipe {product}: {answer.reason}")

    return say


def by_modbus(client: ModbusTcpClient, products: Sequence[str]) -> Callable[[str], None]:
    """Say what runs as a PLC does: write the register, read until it is answered."""

    def say(product: str) -> None:
        number = products.index(product) + 1
        client.write_register(TRIGGER_BASE + RECIPE_WRITTEN, number, device_id=1)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            in_force, answer = client.read_holding_registers(102, count=2, device_id=1).registers
            if (in_force, answer) == (number, 1):
                return
            if answer > 1 or time.monotonic() > deadline:
                raise SystemExit(f"recipe register: number {number} gives {in_force}, answer {answer}")

    return say


def bundle_for(given: Path | None, folder: Path) -> Bundle:
    """Open a bundle for several products, or train one of three generated materials."""
    if given is not None:
        bundle = Bundle.open(given)
        if len(bundle.manifest.products) < 2:
            raise SystemExit(f"{given}: is for one product; give a bundle for several")
        return bundle
    # Imported here: a box has neither torch nor the trainer.
    from deploy.progress import no_progress
    from trainer.data.conveyor import write_default
    from trainer.export import export_run
    from trainer.fit import train

    kinds = ("brick", "gravel", "grass")
    for kind in kinds:
        write_default(folder / kind, seed=0, kind=kind, test_good=0, test_defective=0)
    run = train(method="onenip", data=[folder / kind for kind in kinds], out=folder / "run", progress=no_progress)
    return export_run(run.path, folder / "bundle")


def main(arguments: Sequence[str] | None = None) -> list[Goal]:
    """Measure and print; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bundle", type=Path, help="bundle for several products; trained on generated data if absent")
    parser.add_argument("--rounds", type=int, default=150, help="switches over each of MQTT and Modbus")
    options = parser.parse_args(arguments)
    if shutil.which("mosquitto") is None:
        raise SystemExit("mosquitto is not on the path; on Debian: apt-get install mosquitto")
    heading("product switch")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = bundle_for(options.bundle, folder)
        products = bundle.manifest.products
        (folder / "broker").mkdir()
        broker = Mosquitto(folder / "broker")
        broker.start()
        try:
            with running(bundle, folder, broker.url) as (box, heard):
                asked = BrokerSettings(url=broker.url)
                with Commander(asked, site="plant", box="box1") as commander:
                    over_mqtt = by_mqtt(commander)
                    measure(box, heard, over_mqtt, products, 5)  # what happens once
                    found = {"MQTT": measure(box, heard, over_mqtt, products, options.rounds)}
                port = box.status()["detail"]["inspection"]["modbus"]["port"]
                client = ModbusTcpClient("127.0.0.1", port=port)
                client.connect()
                found["Modbus"] = measure(box, heard, by_modbus(client, products), products, options.rounds)
                client.close()
        finally:
            broker.stop()
    method = bundle.manifest.method
    print(f"{method} for {len(products)} products, {options.rounds} switches each; 99th percentiles\n")
    goals = []
    for name, one in found.items():
        goals += [
            _goal(f"{name}: word to verdict, without the wait for a frame", one.whole, GOAL_MS),
            _goal(f"{name}: until the recipe holds", one.holds),
            _goal(f"{name}: until it is acknowledged", one.told),
            _goal(f"{name}: capture to verdict of the first frame", one.judged),
            _goal(f"{name}: capture to verdict of other frames", one.usual),
        ]
    print_goals(goals)
    return goals


def _goal(name: str, values: Sequence[float], limit: float = float("nan")) -> Goal:
    return Goal(name, float(np.quantile(values, 0.99)), limit, at_least=False, spread=spread(values), unit="ms")


if __name__ == "__main__":
    main()
