"""What ``lightning-ulysses doctor`` asks of a machine before a training is started on it."""

from lightning_ulysses.diagnosis.examination import examine
from lightning_ulysses.diagnosis.finding import Finding

__all__ = ["Finding", "examine"]
