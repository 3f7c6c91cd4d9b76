"""Does a box lose anything, and how soon is it back? Kills, cuts, damage, a full disk, clocks that jump.

Each fault has a control: the same run without what guards against it, which must show a loss. All parts take 15
minutes; ``--part`` chooses some.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._setting import Goal, heading, print_goals, spread
from tests.faults.append_rate import append_rate, append_rate_with_slow_disk
from tests.faults.box_kills import kill_alert_boxes, kill_whole_boxes
from tests.faults.broker_kills import kill_broker
from tests.faults.clock_steps import step_clock
from tests.faults.full_disk import fill_under_box, fill_under_outbox, refused_while_full, restart_on_full_disk
from tests.faults.history import keep
from tests.faults.log_damage import damage_log, leave_crashed
from tests.faults.network_cut import Cut, cut_network
from tests.faults.write_order import trace_alert_box
from tests.mosquitto_process import Mosquitto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.faults.history import Report

NOTHING = math.nan
RESUMED_S, DRAINED_S, LIVE_S, START_S, RECOVERED_S, RATIO, STORM = 10.0, 60.0, 2.0, 2.0, 5.0, 0.95, 2.0
_SLOW_SYNC_MS = 5.0


@dataclass(frozen=True)
class Setting:
    """Where a part works, and how much of it is asked for."""

    folder: Path
    seed: int
    tiny: bool

    def count(self, full: int, few: int) -> int:
        """So many, or few where it is only to be seen that it runs."""
        return few if self.tiny else full

    def new_folder(self, name: str) -> Path:
        """A folder that did not exist."""
        folder = self.folder / name
        folder.mkdir()
        return folder

    @contextmanager
    def broker(self, name: str, **options: Any) -> Iterator[Mosquitto]:  # noqa: ANN401 (Mosquitto's own)
        """A mosquitto that runs inside."""
        broker = Mosquitto(self.new_folder(name), **options)
        broker.start()
        try:
            yield broker
        finally:
            broker.stop()


def lost(name: str, history: Path, report: Report, seed: int) -> Goal:
    """Everything that may not be, against none; the history of a run that shows some is kept."""
    said = str(report)
    if not report.sound:
        said += f"; history kept as {keep(history, seed=seed)}"
    return Goal(name, float(len(report.lost) + len(report.findings)), 0.0, False, said)


def loses(name: str, report: Report) -> Goal:
    """A control run, which must lose."""
    return Goal(f"control: {name}", float(len(report.lost)), 1.0, True, str(report), "lost")


def kills(setting: Setting) -> list[Goal]:
    """A box that alerts, killed."""
    count, seed = setting.count(200, 4), setting.seed
    with setting.broker("kills") as broker:
        folder = setting.new_folder("kills-box")
        history, report = kill_alert_boxes(broker, folder, kills=count, rate=20, seed=seed)
    with setting.broker("kills-control") as broker:
        folder = setting.new_folder("kills-control-box")
        _, control = kill_alert_boxes(broker, folder, kills=8, rate=20, seed=seed, durable=False)
    return [
        lost(f"lost or wrong after {count} SIGKILLs of a box at 20 alerts/s", history, report, seed),
        loses("a new outbox in each life", control),
    ]


def box(setting: Setting) -> list[Goal]:
    """A whole box with cameras, killed."""
    count, seed = setting.count(50, 3), setting.seed
    with setting.broker("box") as broker:
        folder = setting.new_folder("box-box")
        history, report, wrong = kill_whole_boxes(broker, folder, kills=count, fps=10, seed=seed)
    return [
        lost(f"lost or wrong after {count} SIGKILLs of `lineward run`, 2 cameras", history, report, seed),
        Goal("events whose phases do not fit", float(len(wrong)), 0.0, False, "; ".join(wrong) or "new, update, end"),
    ]


def order(setting: Setting) -> list[Goal]:
    """System calls of a box."""
    goals, rows = [], setting.count(500, 40)
    for synced in (True, False):
        name = f"order-{synced}"
        with setting.broker(name) as broker:
            found = trace_alert_box(broker, setting.new_folder(f"{name}-box"), rows=rows, synced=synced)
        said = f"{len(found.sent)} alerts seen leaving, {found.syncs} syncs of the log seen"
        # A trace that does not show everything shows nothing.
        early = float(len(found.early)) if len(found.sent) >= rows else NOTHING
        if synced:
            goals.append(Goal("alerts sent before their row was synced", early, 0.0, False, said))
        else:
            goals.append(Goal("control: synchronous=NORMAL", early, 1.0, True, said, "early"))
    return goals


def broker(setting: Setting) -> list[Goal]:
    """A broker that saves each second, killed."""
    count, seed = setting.count(30, 3), setting.seed
    with setting.broker("broker", autosave_s=1) as process:
        history, report = kill_broker(process, setting.new_folder("broker-box"), kills=count, seed=seed)
    with setting.broker("broker-control", autosave_s=1) as process:
        folder = setting.new_folder("broker-control-box")
        _, control = kill_broker(process, folder, kills=setting.count(10, 3), seed=seed, replay_seconds=0)
    return [
        lost(f"lost or wrong after {count} SIGKILLs of mosquitto, subscriber away", history, report, seed),
        loses("nothing is sent again", control),
    ]


def cut(setting: Setting) -> list[Goal]:
    """A line that is cut in three ways."""
    goals = []
    seconds, rows = setting.count(60, 2), setting.count(10_000, 300)
    for how in Cut:
        with setting.broker(f"cut-{how.value}") as process:
            history, found = cut_network(
                process, setting.new_folder(f"cut-{how.value}-box"), how, cut_s=seconds, backlog=rows,
                options=("--keepalive", "1" if setting.tiny else "10", "--patient"),
            )  # fmt: skip
        name = f"{how.value} for {seconds} s"
        backlog = f"{found.backlog} rows waited"
        goals += [
            lost(f"{name}: lost or wrong", history, found.report, setting.seed),
            Goal(f"{name}: publishing again after", found.resumed_s, RESUMED_S, False, backlog, "s"),
            Goal(f"{name}: backlog drained in", found.drained_s, DRAINED_S, False, backlog, "s"),
            Goal(f"{name}: longest wait of a live alert meanwhile", found.live_wait_s, LIVE_S, False,
                 f"{found.live} live alerts, {found.overtaking} came before the last of the backlog", "s"),
        ]  # fmt: skip
    with setting.broker("cut-lane") as process:
        _, one = cut_network(process, setting.new_folder("cut-lane-box"), Cut.RESET, cut_s=2, backlog=rows,
                             options=("--one-lane",))  # fmt: skip
    with setting.broker("cut-alive") as process:
        _, deaf = cut_network(process, setting.new_folder("cut-alive-box"), Cut.HALF_OPEN, cut_s=2, backlog=10,
                              patience_s=11, options=("--keepalive", "600"))  # fmt: skip
    return [
        *goals,
        Goal("control: live alerts that overtake in one lane", float(one.overtaking), 0.0, False,
             f"of {one.live}; the longest wait is {one.live_wait_s:.2f} s of {one.drained_s:.2f} s"),
        Goal("control: half-open, keep-alive of 10 minutes, publishing again after", deaf.resumed_s, RESUMED_S, True,
             "watched for 11 s", "s"),
    ]  # fmt: skip


def damage(setting: Setting) -> list[Goal]:
    """Files that a box left when it died."""
    source, cases = setting.folder / "damage-copy", setting.count(1000, 30)
    lengths = leave_crashed(setting.new_folder("damage-crashed"), source)
    found = damage_log(source, lengths, setting.new_folder("damage"), cases=cases, seed=setting.seed)
    (source / "outbox.db-mark").unlink()
    control = damage_log(source, lengths, setting.new_folder("damage-control"), cases=30, seed=setting.seed)
    said = "; ".join(found.findings[:3]) or f"rows after the damage were gone, and counted, in {found.lost} cases"
    return [
        Goal(f"wrong in {cases} damaged logs", float(len(found.findings)), 0.0, False, said),
        Goal("slowest start from a damaged log", found.slowest_s, START_S, False, "40 rows", "s"),
        Goal("control: without the mark beside the outbox", float(len(control.findings)), 1.0, True,
             f"of {control.cases} logs; {control.findings[0] if control.findings else ''}", "wrong"),
    ]  # fmt: skip


def disk(setting: Setting) -> list[Goal]:
    """A file system of 24 MiB, filled."""
    with setting.broker("disk") as process:
        found = fill_under_box(process, setting.new_folder("disk-box"), rounds=setting.count(5, 1), phase_s=8)
    with setting.broker("disk-evidence") as process:
        with_evidence = fill_under_box(
            process, setting.new_folder("disk-evidence-box"), rounds=setting.count(3, 1), phase_s=8,
            evidence={"max_mb": 8, "min_free_mb": 1},
        )  # fmt: skip
    with setting.broker("disk-outbox") as process:
        outbox = fill_under_outbox(process, setting.new_folder("disk-outbox-box"), rows=2500)
    with setting.broker("disk-owned") as process:
        owned = refused_while_full(process, setting.new_folder("disk-owned-box"), rows=300)
        unowned = refused_while_full(
            process, setting.new_folder("disk-unowned-box"), rows=300, options=("--unowned",)
        )  # fmt: skip
    restarts = {}
    for name, more in (("owned", ()), ("unowned", ("--unowned",))):
        with setting.broker(f"disk-restart-{name}") as process:
            folder = setting.new_folder(f"disk-restart-{name}-box")
            restarts[name] = restart_on_full_disk(process, folder, rows=100, options=more)[1]
    goals = []
    for name, run in (("", found), (", evidence on", with_evidence)):
        said = f"{spread(run.ratios, '{:.3f}')}; {len(run.ratios)} rounds"
        counts = f"{run.produced} made, {run.present} arrived, {run.counted} counted as lost"
        counts += f", {run.pictures} pictures on the disk" if run.pictures else ""
        wrong = float(abs(run.produced - run.present - run.counted))
        goals += [
            Goal(f"judged per second with a full disk, as a share of before{name}", run.ratio, RATIO, True, said),
            Goal(f"miscounted messages{name}", wrong, 0.0, False, counts),
            Goal(f"stored again after space returned{name}", run.recovered_s, RECOVERED_S, False, "longest", "s"),
            Goal(f"findings of the history{name}", float(len(run.report.findings)), 0.0, False, str(run.report)),
        ]
    counts = f"{outbox.produced} made, {outbox.present} arrived, {outbox.counted} refused"
    return [
        *goals,
        Goal("outbox alone: miscounted", float(not outbox.exact), 0.0, False, counts),
        Goal("full disk, broker up: refused of 300", float(owned), 0.0, False, "the outbox owns its space"),
        Goal(
            "box started on a full disk: ended with code", float(restarts["owned"]), 0.0, False, "stored 100 messages"
        ),
        Goal(
            "control: files that own no space, started on a full disk: code", float(restarts["unowned"]), 1.0, True, ""
        ),
        Goal("control: files that own no space, refused of 300", float(unowned), 1.0, True, "as SQLite likes"),
    ]


def clock(setting: Setting) -> list[Goal]:
    """A clock that jumps."""
    with setting.broker("clock") as process:
        history, found = step_clock(process, setting.new_folder("clock-box"), step_s=setting.count(15, 1))
    cpu = ", ".join(f"{value:.2f}" for value in found.cpu)
    years = ", ".join(str(year) for year in found.years)
    wrong = float(len(found.stalled) + len(found.wrong_phases))
    return [
        lost("clock steps (1970 at boot, +1 y, -1 y): lost or wrong", history, found.report, setting.seed),
        Goal("clock steps: steps without alerts, wrong events", wrong, 0.0, False, f"years of the alerts: {years}"),
        Goal("clock steps: processor time of a step, as a share of before", found.storm, STORM, False,
             f"cores per step: {cpu}"),
    ]  # fmt: skip


def group(setting: Setting) -> list[Goal]:
    """Threads that append at once."""
    goals = []
    for sync_ms in (0.0, _SLOW_SYNC_MS):
        rows = setting.count(500 if sync_ms == 0 else 100, 20)
        rates: dict[tuple[int, bool], list[float]] = {}
        per_commit = []
        for repeat in range(setting.count(5, 1)):
            for threads in (1, 8):
                for grouped in (True, False):
                    if sync_ms:
                        found = append_rate_with_slow_disk(threads=threads, rows=rows, grouped=grouped, sync_ms=sync_ms)
                    else:
                        folder = setting.new_folder(f"group-{repeat}-{threads}-{grouped}")
                        found = append_rate(folder, threads=threads, rows=rows, grouped=grouped)
                    rates.setdefault((threads, grouped), []).append(found["rows_per_s"])
                    if threads > 1 and grouped:
                        per_commit.append(found["rows_per_commit"])
        where = f"syncs {sync_ms:g} ms slower" if sync_ms else "this disk"
        for threads in (8, 1):
            ratios = [a / b for a, b in zip(rates[threads, True], rates[threads, False], strict=True)]
            said = (
                f"{statistics.median(rates[threads, True]):.0f} against {statistics.median(rates[threads, False]):.0f}"
            )
            said += f" rows/s; {spread(ratios)}"
            said += f"; {statistics.median(per_commit):.1f} rows per sync" if threads > 1 else ""
            name = f"group commit, {threads} thread{'s' * (threads > 1)}, as a multiple of a sync per row, {where}"
            goals.append(Goal(name, statistics.median(ratios), NOTHING, True, said))
    return goals


PARTS: dict[str, Callable[[Setting], list[Goal]]] = {
    "kills": kills, "box": box, "order": order, "broker": broker, "cut": cut, "damage": damage, "disk": disk,
    "clock": clock, "group": group,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; may be given repeatedly")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of faults")
    parser.add_argument("--tiny", action="store_true", help="few of everything, to see that it runs")
    options = parser.parse_args(argv)
    heading("faults")
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory(prefix="lineward-faults-") as name:
        for part in options.part or PARTS:
            folder = Path(name) / part
            folder.mkdir()
            began = time.monotonic()
            try:
                found = PARTS[part](Setting(folder, options.seed, options.tiny))
            except AssertionError as error:
                # One part that cannot be run to its end shall not hide the others.
                found = [Goal(f"{part} did not end", NOTHING, 0.0, False, " ".join(str(error).split())[:300])]
            print(f"{part}: {PARTS[part].__doc__} {time.monotonic() - began:.0f} s, seed {options.seed}\n", flush=True)
            print_goals(found)
            goals += found
    if len(options.part or PARTS) > 1:
        print("all parts\n")
        print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
