"""What a run tells while it goes on: on the terminal, in ``metrics.jsonl``, to Prometheus, TensorBoard and W&B."""

from scinet.telemetry.rows import MetricsLog, Rows, read_metrics
from scinet.telemetry.voice import Silence, Terminal, Voice, configure_logging

__all__ = ["MetricsLog", "Rows", "Silence", "Terminal", "Voice", "configure_logging", "read_metrics"]
