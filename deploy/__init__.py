"""Between trainer and boxes: export, quantise, gate, pack and verify bundles. Never imports ``trainer``."""
