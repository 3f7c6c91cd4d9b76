"""The box: capture, inference, judgement, alerts. Never imports torch, ``deploy`` or ``trainer``."""
