"""What ``lineward aggregate status`` shows: boxes, pools, events, as plain values and as lines. It changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploy.aggregator.identity import read_boxes
from deploy.aggregator.operators import status
from deploy.aggregator.store import Store
from edge.errors import SettingsError

if TYPE_CHECKING:
    from deploy.aggregator.operators import PoolStatus
    from deploy.aggregator.settings import AggregatorSettings


def collect(settings: AggregatorSettings, events: int) -> dict[str, Any]:
    """Return how the aggregator is doing, as JSON values.

    Args:
        settings: of the aggregator.
        events: how many of the last events.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        boxes = read_boxes(settings.boxes)
        folder = {
            "boxes": sorted(boxes.names.values()),
            "revoked": sorted(boxes.revoked.values()),
            "problems": list(boxes.problems),
        }
    except SettingsError as error:
        folder = {"boxes": [], "revoked": [], "problems": [str(error)]}
    found: dict[str, Any] = {"fleet": settings.rounds.fleet, **folder, "pools": [], "events": []}
    if settings.store.is_file():
        with Store(settings.store, serve=False) as store:
            found["pools"] = [_pool(pool, store) for pool in status(store)]
            found["events"] = [
                {"ts": e.ts, "kind": e.kind.value, "pool": e.pool, "box": e.box, "code": e.code, "text": e.text}
                for e in (store.events(limit=events) if events else [])
            ]
    return found


def as_text(found: dict[str, Any]) -> str:
    """Say it in lines for people."""
    lines = [f"fleet {found['fleet']}: {len(found['boxes'])} boxes enrolled, {len(found['revoked'])} keys revoked"]
    lines += [f"  {box}" for box in found["boxes"]]
    lines += [f"  problem: {problem}" for problem in found["problems"]]
    for pool in found["pools"]:
        lines.append(f"pool {pool['pool']}")
        lines.append(f"  round {pool['round']} open since {pool['opened']}: {pool['waiting']} boxes have sent")
        banks = ", ".join(f"{bank['version']} (round {bank['round']})" for bank in pool["banks"]) or "none yet"
        lines.append(f"  banks, newest first: {banks}")
        if pool["quarantined"]:
            lines.append(f"  {pool['quarantined']} updates in quarantine: lineward aggregate quarantine list")
    lines += [" ".join(filter(None, (e["ts"], e["kind"], e["box"], e["text"]))) for e in found["events"]]
    return "\n".join(lines)


def _pool(pool: PoolStatus, store: Store) -> dict[str, Any]:
    return {
        "pool": pool.pool,
        "round": None if pool.round is None else pool.round.round,
        "opened": None if pool.round is None else pool.round.opened,
        "waiting": pool.waiting,
        "quarantined": len(pool.quarantined),
        "banks": [
            {"version": bank.version, "round": bank.round, "sha256": bank.sha256, "origin": bank.origin}
            for bank in store.banks(pool.pool)
        ],
    }
