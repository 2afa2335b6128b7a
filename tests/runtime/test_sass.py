"""The three shapes of the wrong descriptor sum, and sums that are right."""

from __future__ import annotations

import pytest

from dspace.runtime.sass import faults

NEVER_WRITTEN = """
        /*31b0*/                   UIADD3 UR30, UP0, UR30, 0x20, URZ ;
        /*31c0*/                   UIADD3.X UR31, UR31, -0x3ffffff0, URZ, UP0, !UPT ;
        /*31d0*/                   HGMMA.64x16x16.F32.BF16 R32, R60, gdesc[UR28].tnspB, R32 ;
"""

LOW_HALF = """
        /*3100*/                   USGXT.U32 UR16, UR5, 0xe ;
        /*31b0*/                   UIADD3 UR4, UP0, UR16, 0x20, URZ ;
        /*31c0*/                   UIADD3.X UR5, UR16, -0x3ffffff0, URZ, UP0, !UPT ;
"""

STACK_POINTER = """
        /*12f0*/                   IADD3 R9, P1, R1, 0x40, RZ ;
        /*1330*/                   IADD3.X R87, R1, -0x7fffffe0, RZ, P1, !PT ;
"""

RIGHT = """
        /*0020*/                   UIADD3 UR6, UP0, UR4, 0x20, URZ ;
        /*0030*/                   UMOV UR4, URZ ;
        /*0040*/                   UIADD3.X UR5, UR4, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0050*/                   IMAD.MOV.U32 R153, RZ, RZ, RZ ;
        /*0060*/                   IADD3.X R153, R153, 0x40000040, RZ, P1, !PT ;
        /*0070*/                   CS2R R36, SRZ ;
        /*0080*/                   IADD3.X R40, R37, -0x7fffffe0, RZ, P1, !PT ;
        /*0090*/                   IADD3.X R41, RZ, -0x7fffffe0, RZ, P1, !PT ;
        /*00a0*/              @!P0 LDG.E.128 R120, desc[UR24][R2.64] ;
        /*00b0*/                   IADD3.X R3, R8, 0x18, RZ, P1, !PT ;
"""

OVERWRITTEN = """
        /*0050*/                   IMAD.MOV.U32 R153, RZ, RZ, RZ ;
        /*0060*/                   LDG.E.64 R152, desc[UR24][R2.64] ;
        /*0070*/                   IADD3.X R153, R153, 0x40000040, RZ, P1, !PT ;
"""


@pytest.mark.parametrize("text", [NEVER_WRITTEN, LOW_HALF, STACK_POINTER, OVERWRITTEN])
def test_a_sum_with_a_register_that_is_not_zero_is_found(text: str) -> None:
    assert len(faults(text)) == 1


def test_right_sums_pass() -> None:
    assert faults(RIGHT) == ()
