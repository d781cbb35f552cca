//! What a processor says of itself, and instructions around its state.

use vireo_cpu::cpuid::CpuidTable;

use crate::{
    Expected::{Checked, Reports},
    asm::guest,
};

const FSGSBASE: (u32, u32, usize, u32) = (7, 0, 1, 0);
const CX16: (u32, u32, usize, u32) = (1, 0, 2, 13);
const RDTSCP: (u32, u32, usize, u32) = (0x8000_0001, 0, 3, 27);

/// The leaves that `identification` reports, in its order.
const LEAVES: [(u32, u32); 8] =
    [(0, 0), (1, 0), (7, 0), (0x8000_0000, 0), (0x8000_0001, 0), (0x8000_0008, 0), (0x4000_0000, 0), (0x4000_0001, 0)];

/// What the engine was told is what the guest reads, but for the bits that mirror the guest's own settings.
fn as_told(cpuid: &CpuidTable, reports: &[u32]) -> Result<(), String> {
    let mut told = cpuid.clone();
    told.set_topology(0, 1);
    let mut reports = reports.iter();
    for (function, index) in LEAVES {
        let leaf = told.get(function, index);
        for (name, told) in [("EAX", leaf.eax), ("EBX", leaf.ebx), ("ECX", leaf.ecx), ("EDX", leaf.edx)] {
            let free = match (function, name) {
                (1, "ECX") => 1 << 27,          // OSXSAVE
                (1, "EDX") => 1 << 9,           // APIC on
                (7, "ECX") => 1 << 4,           // OSPKE
                (0x8000_0001, "EDX") => 1 << 9, // APIC on
                _ => 0,
            };
            let read = reports.next().ok_or("too few reports")?;
            if (read ^ told) & !free != 0 {
                return Err(format!("CPUID {function:#x}.{index}.{name} is {read:#x}, not {told:#x}"));
            }
        }
    }
    match reports.next() {
        None => Ok(()),
        Some(more) => Err(format!("a report too many: {more:#x}")),
    }
}

guest! {
    /// CPUID gives the leaves that the vCPU was created with.
    cpu identification, Long, Checked(as_told),
    r#"
    .macro LEAF function
        mov eax, \function
        xor ecx, ecx
        cpuid
        mov esi, edx
        REPORT eax
        REPORT ebx
        REPORT ecx
        REPORT esi
    .endm
        LEAF 0
        LEAF 1
        LEAF 7
        LEAF 0x80000000
        LEAF 0x80000001
        LEAF 0x80000008
        LEAF 0x40000000
        LEAF 0x40000001
        DONE
    .purgem LEAF
    "#,
    emulator_errs: Some("shows some of the host's own CPUID"),
}

guest! {
    /// MSRs that every kernel uses: they keep what is written, and refuse what they must.
    cpu model_specific_registers, Long,
    Reports(&[
        0x1122_3344, 0xffff_8000, 0x5678, 0x0023_0010, 0xd01, 0, 0xfee0_0900, 0x0007_0406, 0x0007_0406, 1, 0x10, 0x3e00,
    ]),
    r#"
        mov ecx, 0xc0000102 // KERNEL_GS_BASE
        mov eax, 0x11223344
        mov edx, 0xffff8000
        wrmsr
        xor eax, eax
        xor edx, edx
        rdmsr
        mov ebx, edx
        REPORT eax
        REPORT ebx
        mov ecx, 0xc0000081 // STAR
        mov eax, 0x5678
        mov edx, 0x00230010
        wrmsr
        xor edx, edx
        rdmsr
        mov ebx, edx
        REPORT eax
        REPORT ebx
        mov ecx, 0xc0000080 // EFER
        rdmsr
        mov ebx, edx
        REPORT eax
        REPORT ebx
        mov ecx, 0x1b // APIC base: on, boot processor
        rdmsr
        REPORT eax
        mov ecx, 0x277 // PAT
        mov eax, 0x00070406
        mov edx, 0x00070406
        wrmsr
        rdmsr
        mov ebx, edx
        REPORT eax
        REPORT ebx
        // the TSC goes up
        rdtsc
        mov ebx, eax
        mov esi, edx
        rdtsc
        sub eax, ebx
        sbb edx, esi
        setge al
        movzx eax, al
        REPORT eax
        mov ecx, 0x174 // SYSENTER_CS
        mov eax, 0x10
        xor edx, edx
        wrmsr
        xor eax, eax
        rdmsr
        REPORT eax
        mov ecx, 0xc0000084 // SFMASK
        mov eax, 0x3e00
        wrmsr
        xor eax, eax
        rdmsr
        REPORT eax
        DONE
    "#
}

guest! {
    /// PAT refuses types that there are not; the TSC can be set.
    cpu pat_and_tsc_writes, Long, Reports(&[13, 0, 0, 1]),
    r#"
        mov ecx, 0x277
        mov edx, 0x00070406
        mov eax, 0x00070402 // no such type
        CATCH wrmsr
        mov ecx, 0x10
        xor eax, eax
        mov edx, 0x00100000
        wrmsr
        rdmsr
        shr edx, 20
        mov ebx, edx
        REPORT ebx
        DONE
    "#,
    emulator_errs: Some("takes any PAT and ignores writes to the TSC"),
}

guest! {
    /// CR0, CR2, CR4, SMSW, LMSW, and IA32_APIC_BASE as they read back.
    cpu control_registers, Long,
    Reports(&[0x8001_0033, 0x33, 0x8001_003b, 0x8001_003b, 0x8001_0033, 0x1234_5678, 0x9abc_def0, 0x6a0, 0x6a4, 2]),
    r#"
        mov rax, cr0
        REPORT eax
        smsw eax
        movzx eax, ax
        REPORT eax
        // LMSW sets TS; it cannot clear PE
        mov eax, 0x3b
        lmsw ax
        mov rax, cr0
        REPORT eax
        mov eax, 0x3a
        lmsw ax
        mov rax, cr0
        REPORT eax
        clts
        mov rax, cr0
        REPORT eax
        mov rax, 0x9abcdef012345678
        mov cr2, rax
        xor eax, eax
        mov rax, cr2
        REPORT eax
        shr rax, 32
        REPORT eax
        mov rax, cr4
        REPORT eax
        or eax, 4 // TSD
        mov cr4, rax
        mov rax, cr4
        REPORT eax
        // flags that POPF keeps: bit 1 is always 1, bits 3, 5 and 15 always 0
        push 0x802a
        popfq
        pushfq
        pop rax
        REPORT eax
        DONE
    "#
}

guest! {
    /// CR4.TSD and RDTSCP: ring 3 and the time stamp counter.
    cpu time_stamp_disable, Long, Reports(&[0x55, 0x30d, 0, 0, 0x66]),
    r#"
        TO_USER
        rdtsc
        REPORTU 0x55
        TO_KERNEL
        mov rax, cr4
        or eax, 4
        mov cr4, rax
        rdtsc
        TO_USER
        CATCH rdtsc
        TO_KERNEL
        REPORT 0x66
        DONE
    "#,
    emulator_errs: Some("ignores CR4.TSD in ring 3"),
}

guest! {
    /// RDTSCP brings TSC_AUX along.
    cpu rdtscp, Long, Reports(&[0x77, 0x88]),
    r#"
        mov ecx, 0xc0000103
        mov eax, 0x77
        xor edx, edx
        wrmsr
        rdtscp
        REPORT ecx
        mov ecx, 0xc0000103
        mov eax, 0x88
        xor edx, edx
        wrmsr
        rdmsr
        REPORT eax
        DONE
    "#,
    needs: &[RDTSCP],
}

guest! {
    /// FS and GS bases by MSR, SWAPGS, what loading a selector does to a base, CS and DS overrides.
    cpu swapgs_and_bases, Long, Reports(&[0x1111, 0x2222, 0x3333, 0x2222, 0x2, 0x1111, 0x4444, 0x1111]),
    r#"
        mov dword ptr [0x20000], 0x1111
        mov dword ptr [0x21000], 0x2222
        mov dword ptr [0x22000], 0x3333
        mov dword ptr [0x10], 0x4444
        mov ecx, 0xc0000100
        mov eax, 0x20000
        xor edx, edx
        wrmsr
        REPORT dword ptr fs:[0]
        mov ecx, 0xc0000101
        mov eax, 0x21000
        wrmsr
        REPORT dword ptr gs:[0]
        mov ecx, 0xc0000102
        mov eax, 0x22000
        wrmsr
        swapgs
        REPORT dword ptr gs:[0]
        swapgs
        REPORT dword ptr gs:[0]
        rdmsr
        shr eax, 16
        REPORT eax
        // a base of FS below 0: wraps; DS has none in 64-bit mode
        mov eax, -0x1000
        movsxd rax, eax
        REPORT dword ptr fs:[0]
        // loading a selector loads the descriptor's base
        mov eax, 0x18
        mov fs, eax
        REPORT dword ptr fs:[0x10]
        mov eax, 0x78 // base 0x20000, which 64-bit mode ignores for DS
        mov ds, eax
        REPORT dword ptr ds:[0x20000]
        DONE
    "#
}

guest! {
    /// RDFSBASE and friends, in ring 3, and their #UD without CR4.FSGSBASE.
    cpu fsgsbase, Long, Reports(&[0x306, 0, 0, 0x20000, 0x1111, 0x1122_3344, 0x77]),
    r#"
        mov dword ptr [0x20010], 0x1111
        TO_USER
        CATCH rdfsbase rax
        TO_KERNEL
        mov rax, cr4
        bts rax, 16
        mov cr4, rax
        TO_USER
        mov eax, 0x40020000
        wrfsbase rax
        rdfsbase rbx
        and ebx, 0x3fffffff
        REPORTU ebx
        mov eax, fs:[0x10]
        REPORTU eax
        mov rax, 0x11223344
        wrgsbase rax
        rdgsbase rbx
        REPORTU ebx
        TO_KERNEL
        REPORT 0x77
        DONE
    "#,
    needs: &[FSGSBASE],
}

guest! {
    /// CMPXCHG, CMPXCHG8B, CMPXCHG16B, XADD, XCHG: results, ZF, and the write that happens either way.
    cpu cmpxchg_and_xadd, Long,
    Reports(&[1, 7, 0, 7, 1, 0x55, 0x66, 0, 0x55, 0x66, 1, 3, 4, 13, 0, 0, 14, 3, 0, 0x8000_0000]),
    r#"
        mov ebx, 0x20000
        mov dword ptr [rbx], 5
        mov eax, 5
        mov ecx, 7
        lock cmpxchg [rbx], ecx
        sete al
        movzx eax, al
        REPORT eax
        REPORT dword ptr [rbx]
        mov eax, 5
        mov ecx, 9
        lock cmpxchg [rbx], ecx
        mov esi, eax
        sete al
        movzx eax, al
        REPORT eax
        REPORT esi
        // CMPXCHG8B: EDX:EAX against memory, ECX:EBX into it
        mov edi, 0x20040
        xor eax, eax
        xor edx, edx
        mov ebx, 0x55
        mov ecx, 0x66
        lock cmpxchg8b [rdi]
        sete al
        movzx eax, al
        REPORT eax
        REPORT dword ptr [rdi]
        REPORT dword ptr [rdi + 4]
        mov eax, 1
        mov edx, 1
        lock cmpxchg8b [rdi]
        mov esi, edx
        mov ebp, eax
        sete al
        movzx eax, al
        REPORT eax
        REPORT ebp
        REPORT esi
        // CMPXCHG16B wants alignment
        mov edi, 0x20080
        xor eax, eax
        xor edx, edx
        mov ebx, 3
        mov ecx, 4
        lock cmpxchg16b [rdi]
        sete al
        movzx eax, al
        REPORT eax
        REPORT dword ptr [rdi]
        REPORT dword ptr [rdi + 8]
        CATCH cmpxchg16b [rdi + 8]
        // a comparison that fails is a write all the same
        mov dword ptr [0x4010], 0x60003
        mov dword ptr [0x60000], 0x61003
        mov dword ptr [0x61000], 0x90001
        mov ebx, 0x80000000
        mov eax, 0x1234
        CATCH lock cmpxchg [rbx], ecx
        DONE
    "#,
    needs: &[CX16],
    emulator_errs: Some("does not fault for CMPXCHG16B that is not aligned"),
}

guest! {
    /// MOVS over itself, SCAS and CMPS with their prefixes, address sizes, counts of 0, DF.
    cpu string_instructions, Long,
    Reports(&[0x4141_4141, 0x0102_0304, 5, 0x20003, 0, 0x10, 2, 0x2000a, 0, 0x20020, 0x5566, 0xffff_fff0]),
    r#"
        cld
        mov ebx, 0x20000
        // a forward copy by one byte spreads the first one
        mov byte ptr [rbx], 0x41
        mov esi, ebx
        lea edi, [rbx + 1]
        mov ecx, 7
        rep movsb
        REPORT dword ptr [rbx + 4]
        mov dword ptr [rbx], 0x01020304
        std
        lea esi, [rbx]
        lea edi, [rbx + 0x10]
        mov ecx, 1
        rep movsd
        cld
        REPORT dword ptr [rbx + 0x10]
        // SCASB finds byte 3 at offset 1 (of 04 03 02 01)
        mov al, 2
        mov edi, ebx
        mov ecx, 8
        repne scasb
        REPORT ecx
        REPORT edi
        // CMPS: equal to the end
        mov esi, ebx
        lea edi, [rbx + 0x10]
        mov ecx, 4
        repe cmpsb
        REPORT ecx
        mov ecx, 0x10
        REPORT ecx
        // and unequal: flags of the last pair
        mov qword ptr [rbx], 0
        mov qword ptr [rbx + 0x10], 0
        mov byte ptr [rbx + 0x12], 1
        mov esi, ebx
        lea edi, [rbx + 0x10]
        mov ecx, 5
        repe cmpsb
        REPORT ecx
        lea eax, [rsi + 7]
        REPORT eax
        // a zero count does nothing and keeps flags
        xor ecx, ecx
        cmp ecx, ecx
        mov edi, 0x20020
        mov al, 1
        repne scasb
        setne al
        movzx eax, al
        REPORT eax
        REPORT edi
        // 32-bit addresses: EDI wraps within 32 bits, RCX is ECX
        mov rcx, 0x100000001
        mov rdi, 0x500020030
        mov eax, 0x5566
        .byte 0x67
        rep stosd
        REPORT dword ptr [0x20030]
        mov eax, -16
        REPORT eax
        DONE
    "#
}

guest! {
    /// SGDT, SIDT, STR, SLDT, LAR, LSL, VERR, VERW; LTR makes the TSS busy; LLDT with a null selector.
    cpu descriptor_tables, Long,
    Reports(&[0x8f, 0x1000, 0xfff, 0x2000, 0x40, 0, 0x00c0_9300, 1, 0xffff_ffff, 0xfff, 0, 1, 0, 1, 0, 0x8b, 0]),
    r#"
        sgdt [0x20000]
        movzx eax, word ptr [0x20000]
        REPORT eax
        REPORT dword ptr [0x20002]
        sidt [0x20000]
        movzx eax, word ptr [0x20000]
        REPORT eax
        REPORT dword ptr [0x20002]
        str eax
        REPORT eax
        sldt eax
        REPORT eax
        mov ecx, 0x18
        lar eax, ecx
        sete bl
        and eax, 0xfff0ffff // the limit's bits are undefined
        REPORT eax
        movzx eax, bl
        REPORT eax
        lsl eax, ecx
        REPORT eax
        mov ecx, 0x68
        lsl eax, ecx
        REPORT eax
        mov ecx, 0x1000 // beyond the GDT
        lar eax, ecx
        sete al
        movzx eax, al
        REPORT eax
        mov ecx, 0x78 // read-only data
        verr cx
        sete al
        movzx eax, al
        REPORT eax
        verw cx
        sete al
        movzx eax, al
        REPORT eax
        mov ecx, 0x18
        verw cx
        sete al
        movzx eax, al
        REPORT eax
        xor ecx, ecx // null
        verr cx
        sete al
        movzx eax, al
        REPORT eax
        mov byte ptr [0x1045], 0x89
        mov eax, 0x40
        ltr ax
        movzx eax, byte ptr [0x1045]
        REPORT eax
        xor eax, eax
        lldt ax
        sldt eax
        REPORT eax
        DONE
    "#
}

guest! {
    /// MOV between the accumulator and a 64-bit address (A0 to A3), beyond what 32 bits hold.
    cpu absolute_addresses, Long, Reports(&[0x8877_6655, 0x4433_2255, 0x4433_2299, 0x1234_5678, 0x9abc_def0, 0x77]),
    r#"
        mov qword ptr [0x4010], 0x60003 // 0x80000000: the first 2 MiB
        mov qword ptr [0x60000], 0x83
        mov rax, 0x8877665544332211
        mov [0x90000], rax
        xor eax, eax
        movabs rax, [0x80090000]
        mov rdx, rax
        shr rdx, 32
        REPORT edx
        movabs al, [0x80090004]
        REPORT eax
        mov al, 0x99
        movabs [0x80090000], al
        xor eax, eax
        movabs eax, [0x80090000]
        REPORT eax
        mov rax, 0x123456789abcdef0
        movabs [0x80090008], rax
        REPORT dword ptr [0x9000c]
        REPORT dword ptr [0x90008]
        REPORT 0x77
        DONE
    "#
}

guest! {
    /// SCAS and CMPS over several pages: found in a later one, elements across their borders, counts that run out.
    code long_strings, Long, Reports(&[
        0x91804, 0xffd, 0x44, 0x91805, 0x7fe, 0, 0x91803, 0x91804, 0xffe, 0, 0x90882, 0x92181, 0x7f, 0x44,
        0x91801, 0, 0, 0x91805, 0x3ff, 0x44, 0x91709, 0x9f, 0x85,
    ]),
    r#"
        .macro FLAGS
            pushfq
            pop rdx
            and edx, 0x8d5
            REPORT edx
        .endm
        cld
        mov edi, 0x90800
        mov ecx, 0x1800
        mov al, 1
        rep stosb
        mov byte ptr [0x91803], 0
        mov ecx, 0x200
        mov al, 2
        mov edi, 0x92100
        rep stosb
        mov byte ptr [0x92180], 1
        mov al, 0
        mov edi, 0x90801
        mov ecx, 0x2000
        repne scasb
        REPORT edi
        REPORT ecx
        FLAGS
        mov eax, 0x0101
        mov edi, 0x90801
        mov ecx, 0x1000
        repe scasw
        REPORT edi
        REPORT ecx
        FLAGS
        mov esi, 0x90801
        mov edi, 0x90802
        mov ecx, 0x2000
        repe cmpsb
        REPORT esi
        REPORT edi
        REPORT ecx
        FLAGS
        mov esi, 0x90801
        mov edi, 0x92100
        mov ecx, 0x100
        repne cmpsb
        REPORT esi
        REPORT edi
        REPORT ecx
        FLAGS
        mov al, 9
        mov edi, 0x90801
        mov ecx, 0x1000
        repne scasb
        REPORT edi
        REPORT ecx
        FLAGS
        // larger elements from odd addresses
        mov eax, 0x01000101
        mov edi, 0x90801
        mov ecx, 0x800
        repne scasd
        REPORT edi
        REPORT ecx
        FLAGS
        mov esi, 0x90901
        mov edi, 0x90801
        mov ecx, 0x280
        repe cmpsq
        REPORT edi
        REPORT ecx
        FLAGS
        .purgem FLAGS
        DONE
    "#
}
