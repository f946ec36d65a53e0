"""virtio memory balloon. [virtio-v1.2] 5.5."""

from __future__ import annotations

from struct import Struct
from typing import Final


class Feature:
    """[virtio-v1.2] 5.5.3."""

    MUST_TELL_HOST: Final = 1 << 0
    STATS_VQ: Final = 1 << 1
    DEFLATE_ON_OOM: Final = 1 << 2
    FREE_PAGE_HINT: Final = 1 << 3
    PAGE_POISON: Final = 1 << 4
    REPORTING: Final = 1 << 5


PAGE_SIZE: Final = 4096  # of a page frame number, whatever the guest's pages are
PFN_SIZE: Final = 4

CONFIG: Final = Struct("<IIII")  # target pages, actual pages, hint command, poison
ACTUAL_OFFSET: Final = 4
assert CONFIG.size == 16

STATISTIC: Final = Struct("<HQ")  # tag, value
assert STATISTIC.size == 10

STATISTICS: Final = {
    0: "swap_in",
    1: "swap_out",
    2: "major_faults",
    3: "minor_faults",
    4: "free_memory",
    5: "total_memory",
    6: "available_memory",
    7: "disk_caches",
    8: "hugetlb_allocations",
    9: "hugetlb_failures",
}
"""Names of the tags; memory in bytes, the others counts. [virtio-v1.2] 5.5.6.4."""
