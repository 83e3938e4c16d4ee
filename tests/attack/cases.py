"""Every case of the attack, the longest first."""

from damage import DAMAGE
from harness import Case
from kills import KILL_CASES
from odd_input import ODD_INPUT
from ordinary import ORDINARY
from servers import SERVERS
from siege import SIEGE

CASES: list[Case] = [*KILL_CASES, *SERVERS, *ODD_INPUT, *SIEGE, *DAMAGE, *ORDINARY]
