"""What a run asks of a device: its operations, and what travels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operation:
    """One launch.

    Attributes:
        name: of the operator.
        kind: of its arithmetic: ``half``, ``tf32``, ``float32`` (matrix products) or ``other``.
        flops: of matrix products; other arithmetic is hidden behind its bytes.
        bytes: read and written in device memory.
    """

    name: str
    kind: str
    flops: float
    bytes: float


@dataclass
class Seen:
    """What one phase of a run asked of the device.

    Attributes:
        operations: how often each was launched.
        syncs: times the host waited.
        to_device: bytes.
        to_host: bytes.
        peak: most bytes that were allocated on the device at a time.
        sent: bytes that a rank sent to others.
        exchanges: times the ranks exchanged something.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    syncs: int = 0
    to_device: int = 0
    to_host: int = 0
    peak: int = 0
    sent: float = 0.0
    exchanges: int = 0

    def less(self, part: Seen) -> Seen:
        """What this has beyond `part`; the peak is that of the whole."""
        return Seen(
            self.operations - part.operations,
            self.syncs - part.syncs,
            self.to_device - part.to_device,
            self.to_host - part.to_host,
            self.peak,
            self.sent - part.sent,
            self.exchanges - part.exchanges,
        )

    def and_again(self, each: Seen, times: int) -> Seen:
        """What this has, and `times` further times `each`; the peak is that of the first."""
        operations = Counter({operation: times * number for operation, number in each.operations.items()})
        return Seen(
            self.operations + operations,
            self.syncs + times * each.syncs,
            self.to_device + times * each.to_device,
            self.to_host + times * each.to_host,
            self.peak,
            self.sent + times * each.sent,
            self.exchanges + times * each.exchanges,
        )
