//! The state of x87 and vectors, and stores of vectors by a mask.

use crate::{Expected::Reports, asm::guest};

const XSAVE: (u32, u32, usize, u32) = (1, 0, 2, 26);
const AVX: (u32, u32, usize, u32) = (1, 0, 2, 28);
const AVX2: (u32, u32, usize, u32) = (7, 0, 1, 5);

guest! {
    /// FXSAVE and FXRSTOR carry x87, MMX and SSE state; ring 3 uses it.
    vectors fxsave_and_fxrstor, Long, Reports(&[0x37f, 0x1f80, 0x1111_2222, 0x1111_2222, 0x3f80_0000, 0x77]),
    r#"
        TO_USER
        fninit
        mov eax, 0x11112222
        movd xmm5, eax
        fld1
        fxsave [0x40020000]
        pxor xmm5, xmm5
        fninit
        movzx eax, word ptr [0x40020000]
        REPORTU eax
        mov eax, [0x40020018]
        REPORTU eax
        mov eax, [0x400200a0 + 5 * 16]
        REPORTU eax
        fxrstor [0x40020000]
        movd eax, xmm5
        REPORTU eax
        fstp dword ptr [0x40021000]
        mov eax, [0x40021000]
        REPORTU eax
        TO_KERNEL
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// XSAVE only with CR4.OSXSAVE, which CPUID mirrors; XSETBV's checks; saving, clearing and restoring SSE.
    vectors xsave_and_xrstor, Long,
    Reports(&[6, 0, 0, 0, 1, 1, 13, 0, 0, 13, 0, 0, 3, 2, 0x1111_2222, 0x1111_2222, 0, 13, 0, 0]),
    r#"
        xor ecx, ecx
        CATCH xgetbv
        mov eax, 1
        cpuid
        shr ecx, 27
        and ecx, 1
        REPORT ecx
        mov rax, cr4
        bts rax, 18
        mov cr4, rax
        mov eax, 1
        cpuid
        shr ecx, 27
        and ecx, 1
        REPORT ecx
        xor ecx, ecx
        xgetbv
        REPORT eax
        xor eax, eax // x87 cannot go
        xor edx, edx
        CATCH xsetbv
        mov ecx, 1 // no XCR1
        mov eax, 3
        CATCH xsetbv
        xor ecx, ecx
        xsetbv
        xgetbv
        REPORT eax
        mov eax, 0x11112222
        movd xmm3, eax
        mov eax, 2
        xor edx, edx
        xsave [0x20000]
        REPORT dword ptr [0x20200] // XSTATE_BV
        REPORT dword ptr [0x200a0 + 3 * 16]
        pxor xmm3, xmm3
        xrstor [0x20000]
        movd ebx, xmm3
        REPORT ebx
        // a clear XSTATE_BV bit initialises
        mov dword ptr [0x20200], 0
        xrstor [0x20000]
        movd ebx, xmm3
        REPORT ebx
        mov dword ptr [0x20208], 1 // reserved header bytes
        CATCH xrstor [0x20000]
        DONE
    "#,
    needs: &[XSAVE],
}

guest! {
    /// AVX is #UD until XCR0 has it; the upper halves are saved and, by VZEROUPPER, cleared.
    vectors avx_state, Long, Reports(&[0x306, 0, 0, 0x3333_4444, 0x3333_4444, 0, 0x77]),
    r#"
        mov rax, cr4
        bts rax, 18
        mov cr4, rax
        TO_USER
        CATCH vxorps ymm0, ymm0, ymm0
        TO_KERNEL
        xor ecx, ecx
        xor edx, edx
        mov eax, 7
        xsetbv
        TO_USER
        mov dword ptr [0x40021000], 0x33334444
        vbroadcastss ymm2, dword ptr [0x40021000]
        mov eax, 7
        xor edx, edx
        xsave [0x40020000]
        mov eax, [0x40020240 + 2 * 16]
        REPORTU eax
        vzeroupper
        mov eax, 7
        xrstor [0x40020000]
        vextractf128 xmm3, ymm2, 1
        vmovd eax, xmm3
        REPORTU eax
        vzeroupper
        vextractf128 xmm3, ymm2, 1
        vmovd eax, xmm3
        REPORTU eax
        TO_KERNEL
        REPORT 0x77
        DONE
    "#,
    needs: &[XSAVE, AVX],
}

guest! {
    /// Stores by a mask leave all else as it was, also where they cross into a page that lies elsewhere.
    vectors masked_stores, Long,
    Reports(&[0x1111, 2, 0x1111, 2, 2, 0x1111, 2, 0x1111, 2, 2, 0x1111, 2, 0x1111, 2, 2, 0x1111, 2, 0x1111, 2, 2]),
    r#"
        mov rax, cr4
        bts rax, 18
        mov cr4, rax
        xor ecx, ecx
        xor edx, edx
        mov eax, 7
        xsetbv
        mov qword ptr [0x6000 + 8 * 0x90], 0x85003
        invlpg [0x90000]
        mov ebx, 0x90000
        xor edi, edi
        // elements 0 and 4, or 0 and 2 of twice the size
        vpcmpeqd xmm0, xmm0, xmm0
        vpsrldq xmm1, xmm0, 12
        vinsertf128 ymm1, ymm1, xmm1, 1
        vpsrldq xmm2, xmm0, 8
        vinsertf128 ymm2, ymm2, xmm2, 1
        mov eax, 0x1111
        vmovd xmm3, eax
        vinsertf128 ymm3, ymm3, xmm3, 1
        mov eax, 2
        vmovd xmm4, eax
        vpshufd xmm4, xmm4, 0
        vinsertf128 ymm4, ymm4, xmm4, 1
        vxorps ymm5, ymm5, ymm5
        .macro MASKED instruction, mask
            mov ecx, 30
        22: vmovups [rbx + rdi - 20], ymm5 // what no store of a mask may bring back
            vmovups [rbx - 16], xmm4
            vmovups [rbx], xmm4
            mov dword ptr [rbx - 20], 2
            \instruction [rbx + rdi - 16], \mask, ymm3
            dec ecx
            jnz 22b
            REPORT dword ptr [rbx - 16]
            REPORT dword ptr [rbx - 8]
            REPORT dword ptr [rbx]
            REPORT dword ptr [rbx + 8]
            REPORT dword ptr [rbx + 12]
        .endm
        MASKED vmaskmovps, ymm1
        MASKED vmaskmovpd, ymm2
        MASKED vpmaskmovd, ymm1
        MASKED vpmaskmovq, ymm2
        .purgem MASKED
        DONE
    "#,
    needs: &[XSAVE, AVX, AVX2],
}
