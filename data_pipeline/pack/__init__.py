"""Token and record files: Megatron ``.bin``/``.idx`` and the parallel ``.rec``."""
