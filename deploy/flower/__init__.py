"""The fleet's rounds under Flower, for fleets whose operators already run it.

Where ZeroMQ is the default (``lineward aggregate``: one process, milliseconds a message), Flower brings a control
plane, its own node registry and its TLS, at the price of a fresh Python process and some seconds for each message.
Both end in the same functions: the same parser and refusals (:mod:`edge.federation.wire`), the same gates, the same
:func:`deploy.aggregator.aggregate.aggregate`; so the same updates give the same bank.

| file | is |
|---|---|
| ``app/`` | the Flower app that is submitted: a ``pyproject.toml`` that names the two below, and no code |
| ``server.py`` | the ServerApp: settings, store and grid put together, rounds run |
| ``client.py`` | the ClientApp: takes an update from the box's side and gives it the bank |
| ``rounds.py`` | ask, take, close, tell; knows neither Flower nor files |
| ``book.py`` | the aggregator's durable rounds, as ``rounds.py`` asks for them |
| ``grid.py``, ``records.py`` | Flower's messages |
| ``exchange.py`` | the folder that a box and its Flower client share |
| ``submit.py`` | submits a run and tells whether it completed |
| ``quiet.py``, ``flower.env`` | the environment without which no app of ours runs: nothing calls home |

An app is code that a box runs because SuperLink sends it: whoever reaches SuperLink's port can submit one. Ours carries
none, but Flower 1.41 cannot hold a SuperNode to it offline (its trusted entities are reviews on Flower's hub). The
ZeroMQ link carries only data. See ``docs/flower.md``.

``server``, ``client``, ``grid`` and ``records`` need the extra ``flower``, in an environment of its own
(``make flower-env``); the others do not import it.
"""
