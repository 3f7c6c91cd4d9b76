"""The ClientApp: asks the box's side for its update and hands it the bank. It must not know what a memory is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message
from flwr.clientapp import ClientApp

from deploy.flower import records
from deploy.flower.exchange import FolderExchange
from deploy.flower.quiet import require_quiet
from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.app import Context

    from deploy.flower.exchange import Exchange


def folder_of(context: Context) -> Exchange:
    """The folder that the SuperNode's ``--node-config 'exchange="FOLDER"'`` names.

    Raises:
        DataError: it names none, or the folder is missing.
    """
    folder = context.node_config.get("exchange")
    if not isinstance(folder, str) or not folder:
        raise DataError("""exchange: not set; start flower-supernode with --node-config 'exchange="/a/folder"'""")
    return FolderExchange(Path(folder))


def make_client_app(exchange_of: Callable[[Context], Exchange]) -> ClientApp:
    """A ClientApp whose box side is what the callable gives; Flower calls it anew for each message.

    Errors of the box side leave the app: Flower sends them to the ServerApp as the reason why this box gave nothing.
    """

    def update(message: Message, context: Context) -> Message:
        require_quiet()
        content = exchange_of(context).update(records.read_ask(message.content))
        return Message(records.answer(content, ticket=records.read_ticket(message.content)), reply_to=message)

    def bank(message: Message, context: Context) -> Message:
        require_quiet()
        exchange, told = exchange_of(context), records.read_tell(message.content)
        if told.outcome is not None:
            exchange.settle(told.outcome)
        version = exchange.store(told.bank) if told.bank is not None else 0
        return Message(records.kept(version, ticket=records.read_ticket(message.content)), reply_to=message)

    client = ClientApp()
    # Flower finds a handler by the part of the message type behind the dot.
    client.query(records.ASK.partition(".")[2])(update)
    client.query(records.TELL.partition(".")[2])(bank)
    return client


app = make_client_app(folder_of)
"""What the FAB names: the box side is a folder."""
