"""A hash table of voxel keys, filled in parallel with one result whatever the order.

The table is an ordered one (Amble and Knuth, Ordered hash tables, 1974): along a probe sequence
keys descend. An insertion is a chain of ``atomic_max``: a larger key takes the slot and the
displaced one moves on. Slots only grow, so the outcome does not depend on who comes first, a
search may stop at the first smaller key, and dead lanes need no atomic operation.
"""

import triton
import triton.language as tl

from torchsparse._triton.primitives import first_slot

__all__ = ["FREE", "find_slots", "insert_keys"]

FREE = tl.constexpr(-1)  # an unused slot; keys are not negative


@triton.jit
def insert_keys(keys, live, table, shift, slots_mask, most):
    """Insert ``keys`` where ``live``.

    Returns:
        (new, twice, lost, keys): chains that ended in a free slot (their number is the number of
        new keys), those that met their own key, and those that gave up after ``most`` steps; and
        what each moved last, which the latter two left out.
    """
    slot = first_slot(keys, shift, slots_mask)
    new = live & False
    twice = live & False
    step = 0
    while (tl.max(live.to(tl.int32)) > 0) & (step < most):
        seen = tl.load(table + slot, mask=live, other=0)
        # What was read may be old, but never larger than what is there.
        old = tl.atomic_max(table + slot, keys, mask=live & (seen < keys), sem="relaxed")
        old = tl.where(seen < keys, old, seen)
        done_new = live & (old == FREE)
        done_twice = live & (old == keys)
        new |= done_new
        twice |= done_twice
        live &= (old != FREE) & (old != keys)
        keys = tl.where(live & (old < keys), old, keys)
        slot = (slot + 1) & slots_mask
        step += 1
    return new, twice, live, keys


@triton.jit
def find_slots(keys, live, table, shift, slots_mask):
    """The slot of each key, -1 where it is absent or not ``live``."""
    slot = first_slot(keys, shift, slots_mask)
    found = tl.zeros_like(slot) - 1
    while tl.max(live.to(tl.int32)) > 0:
        # Two slots a step: their loads are in flight together, mostly in one sector.
        then = (slot + 1) & slots_mask
        seen = tl.load(table + slot, mask=live, other=FREE)
        next_ = tl.load(table + then, mask=live, other=FREE)
        found = tl.where(live & (next_ == keys), then, found)
        found = tl.where(live & (seen == keys), slot, found)
        live &= (seen > keys) & (next_ > keys)
        slot = (then + 1) & slots_mask
    return found
