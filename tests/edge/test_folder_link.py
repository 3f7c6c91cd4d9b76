"""A link by way of a folder: what the box puts in, what it takes out, and what it does not believe."""

from __future__ import annotations

import hashlib
import json

import pytest

from edge.errors import DataError, FederationError
from edge.federation.connection import LinkKind
from edge.federation.folder_link import BANK, INVITATION, OUTCOME, UPDATE, FolderLink, write_whole
from edge.federation.refusals import Refusal
from edge.federation.wire import Limits, decode_update, encode_bank
from tests.edge.federation_values import EMBEDDING, bank, equal, update

POOL = f"{EMBEDDING}/ball screw"


@pytest.fixture
def link(tmp_path):
    made = FolderLink(tmp_path, fleet="plant", product="ball screw", embedding_id=EMBEDDING)
    made.start()
    return made


def invite(folder, rounds):
    text = {"fleet": "plant", "rounds": rounds, "max_update_bytes": 10**6}
    write_whole(folder / INVITATION, json.dumps(text).encode())


def settle(folder, *, refused=None, sha256=None):
    digest = sha256 or hashlib.sha256((folder / UPDATE).read_bytes()).hexdigest()
    text = {"sha256": digest, "counted_in_round": 0 if refused else 1, "refused": refused, "reason": "as it is"}
    write_whole(folder / OUTCOME, json.dumps(text).encode())


def test_update_waits_in_the_folder_whole(link, tmp_path):
    link.submit(update())

    assert equal(decode_update((tmp_path / UPDATE).read_bytes(), Limits()), update())
    assert [path.name for path in tmp_path.iterdir()] == [UPDATE]


def test_newer_update_takes_the_place_of_one_that_waits(link, tmp_path):
    link.submit(update())
    link.submit(update(round=2))

    assert decode_update((tmp_path / UPDATE).read_bytes(), Limits()).round == 2
    assert link.counters["given_up"] == 1


def test_update_is_forgotten_with_its_receipt(link, tmp_path):
    link.submit(update())
    settle(tmp_path)

    assert link.counters["receipts"] == 1
    assert not (tmp_path / UPDATE).exists()
    assert link.state.kind is LinkKind.CONNECTED


def test_receipt_of_a_former_update_leaves_the_new_one(link, tmp_path):
    link.submit(update())
    digest = hashlib.sha256((tmp_path / UPDATE).read_bytes()).hexdigest()
    link.submit(update(round=2))
    settle(tmp_path, sha256=digest)

    assert link.counters["receipts"] == 1
    assert (tmp_path / UPDATE).exists()


def test_update_refused_for_now_stays_and_one_refused_for_good_goes(link, tmp_path):
    link.submit(update())
    settle(tmp_path, refused=Refusal.BUSY.value)
    assert link.counters["refused"] == {"busy": 1}
    assert (tmp_path / UPDATE).exists()

    settle(tmp_path, refused=Refusal.STALE_ROUND.value)
    assert link.counters["refused"] == {"busy": 1, "stale_round": 1}
    assert not (tmp_path / UPDATE).exists()


def test_box_that_is_not_served_is_a_visible_state(link, tmp_path):
    assert link.state.kind is LinkKind.CONNECTING
    link.submit(update())
    settle(tmp_path, refused=Refusal.STOLEN_NAME.value)

    assert link.state.kind is LinkKind.REFUSED
    assert "stolen_name" in link.state.reason


def test_refusal_of_a_later_version_is_other(link, tmp_path):
    link.submit(update())
    settle(tmp_path, refused="not known yet")

    assert link.counters["refused"] == {"other": 1}


def test_bank_is_returned_once(link, tmp_path):
    write_whole(tmp_path / BANK, encode_bank(bank(version=2)))

    assert equal(link.poll_bank(), bank(version=2))
    assert link.poll_bank() is None

    write_whole(tmp_path / BANK, encode_bank(bank(version=3)))
    assert link.poll_bank().version == 3


@pytest.mark.parametrize(
    "content",
    [
        encode_bank(bank(fleet="other")),
        encode_bank(bank(pool=f"{EMBEDDING}/other part")),
        encode_bank(bank(embedding_id="cd" * 32, pool="cd" * 32)),
        encode_bank(bank())[:-1],
        b"",
    ],
    ids=["fleet", "product", "embedding", "cut off", "empty"],
)
def test_bank_that_is_not_ours_is_not_taken(link, tmp_path, content):
    write_whole(tmp_path / BANK, content)

    assert link.poll_bank() is None
    assert link.state.kind is LinkKind.CONNECTING


def test_bank_of_all_products_is_taken(link, tmp_path):
    write_whole(tmp_path / BANK, encode_bank(bank(pool=EMBEDDING)))

    assert link.poll_bank() is not None


def test_round_is_the_open_one(link, tmp_path):
    assert link.round == 1
    invite(tmp_path, {"cd" * 32: 9, POOL: 4})
    assert link.round == 4
    write_whole(tmp_path / BANK, encode_bank(bank(round=4)))
    assert link.round == 5
    invite(tmp_path, {POOL: 7})
    assert link.round == 7


@pytest.mark.parametrize("name", [INVITATION, OUTCOME])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"sha256": 1, "rounds": {"a": -1}}', b"[" * 5000])
def test_damaged_text_is_left_alone(link, tmp_path, name, content):
    link.submit(update())
    write_whole(tmp_path / name, content)

    assert link.round == 1
    assert link.state.kind is LinkKind.CONNECTING
    assert (tmp_path / UPDATE).exists()


def test_folder_must_be_there(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        FolderLink(tmp_path / "missing", fleet="plant", product="part", embedding_id=EMBEDDING)


def test_update_that_cannot_be_stored_is_an_error_and_the_former_stays(link, tmp_path):
    link.submit(update())
    (tmp_path / "taken").mkdir()

    with pytest.raises(DataError, match="cannot be written"):
        write_whole(tmp_path / "taken", b"x")
    with pytest.raises(FederationError):
        link.submit(update(fleet=""))
    assert equal(decode_update((tmp_path / UPDATE).read_bytes(), Limits()), update())
