"""What the emulator raises."""


class EmulatorError(Exception):
    """A kernel did something wrong: names the block, the thread, the PTX line and what happened."""


class UnsupportedPtx(EmulatorError):
    """The PTX has an instruction or operand that the emulator does not know."""
