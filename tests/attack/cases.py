"""Every case of the attack, the longest first."""

from harness import Case
from siege import SIEGE

CASES: list[Case] = [*SIEGE]
