"""Many adapters trained at once on one frozen base: ``callback.py`` has ``LoRASweep``."""
