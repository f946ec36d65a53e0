"""Windows Hypervisor Platform on a machine without Windows, for testing code that uses it. See `simulator`."""

from .profiles import PROFILES, Profile
from .simulator import Call, SimulatedWhp

__all__ = ["PROFILES", "Call", "Profile", "SimulatedWhp"]
