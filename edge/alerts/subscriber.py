"""A subscriber as an integrator wants it: connected, free of duplicates, and aware of what is missing."""


class Subscriber:
    """Work in progress: the signatures are final. A context manager; iterating yields ``Received`` until stopped."""

    def __init__(self, settings: BrokerSettings, *, site: str = "+", box: str = "+", kinds=DEFAULT_KINDS, window: int = 100_000) -> None: ...
    def receive(self, timeout: float | None = None) -> Received | None: ...  # .topic, .message, .payload, .received_at
    def stop(self) -> None: ...
    missing: dict  # (site, box, epoch) -> numbers not seen
    duplicates: int
