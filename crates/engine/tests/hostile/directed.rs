//! Guests that were thought up.

use std::{sync::atomic::AtomicU64, time::Duration};

use vireo_cpu::{CpuState, DescriptorTable, Engine, Exit, Segment, VcpuConfig};
use vireo_engine::SoftEngine;
use vireo_memory::GuestMemory;

use super::{
    random::Random,
    round::{Rubbish, shortest_latency},
};

const RAM: u64 = 4 << 20;
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
const CODE: u64 = 0x1_0000;
/// On an idle host the longest are some 100 µs; the best of five is looked at.
const PROMPT: Duration = Duration::from_millis(50);

fn bus() -> Rubbish {
    Rubbish(AtomicU64::new(1))
}

/// 64-bit mode with the first GiB and the fourth mapped where they are, and the code at [`CODE`].
fn long_mode(code: &[u8]) -> (GuestMemory, CpuState) {
    let memory = GuestMemory::new(RAM, RAM).unwrap();
    let put = |at: u64, value: u64| memory.write_pod(at, value).unwrap();
    put(TABLES, (TABLES + 0x1000) | 3);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 3);
    put(TABLES + 0x1000 + 24, 0xc000_0083);
    for i in 0..512 {
        put(TABLES + 0x2000 + i * 8, i << 21 | 0x83);
    }
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    memory.write(CODE, code).unwrap();
    let mut state = CpuState::reset();
    state.rip = CODE;
    state.gpr[4] = 0x8000;
    state.cr0 = 0x8000_0011;
    state.cr3 = TABLES;
    state.cr4 = 0x6a0;
    state.efer = 0xd00;
    state.segments = [Segment { selector: 16, ..Segment::DATA }; 6];
    state.segments[1] = Segment { selector: 8, ..Segment::CODE64 };
    state.gdtr = DescriptorTable { base: GDT, limit: 23 };
    state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    state.tr = Segment { selector: 0x18, base: TSS, ..Segment::TSS };
    (memory, state)
}

/// An interrupt gate on stack IST1, which is at 0x9000.
fn gate(memory: &GuestMemory, number: u64, target: u64) {
    let low = target & 0xffff | 8 << 16 | 0x8e01 << 32 | (target >> 16 & 0xffff) << 48;
    memory.write_pod(IDT + number * 16, low).unwrap();
    memory.write_pod(IDT + number * 16 + 8, target >> 32).unwrap();
    memory.write_pod(TSS + 0x24, 0x9000u64).unwrap();
}

fn end_of(memory: &GuestMemory, state: &CpuState) -> Exit {
    let [interpreted, translated] = [0, 1].map(|promote| end_on(memory, state, promote));
    assert_eq!(interpreted, translated);
    translated
}

fn end_on(memory: &GuestMemory, state: &CpuState, promote: u32) -> Exit {
    let engine = SoftEngine::promoting(memory, promote).unwrap();
    let cpuid = engine.supported_cpuid().unwrap();
    let mut vcpu = engine.create_vcpu(&VcpuConfig { id: 0, count: 1, cpuid }).unwrap();
    vcpu.set_state(state).unwrap();
    vcpu.run(&bus()).unwrap()
}

#[test]
fn a_page_fault_handler_that_cannot_be_fetched_is_kicked_out_of() {
    let (memory, state) = long_mode(&[0x0f, 0x0b]);
    gate(&memory, 6, 0x4000_0000);
    gate(&memory, 14, 0x4000_0000);
    let latency = shortest_latency(&memory, &state, &bus());
    assert!(latency < PROMPT, "{latency:?}");
}

#[test]
fn a_debug_handler_with_a_breakpoint_on_itself_is_kicked_out_of() {
    let (memory, mut state) = long_mode(&[0xf1]);
    gate(&memory, 1, CODE + 0x100);
    state.debug[0] = CODE + 0x100;
    state.debug[5] = 0x402;
    let latency = shortest_latency(&memory, &state, &bus());
    assert!(latency < PROMPT, "{latency:?}");
}

/// The whole lower half of the address space is one page full of MOV SS, AX, each of which holds interrupts off.
#[test]
fn endless_loads_of_ss_are_kicked_out_of() {
    let (memory, mut state) = long_mode(&[0x8e, 0xd0].repeat(2048));
    for level in 0..3 {
        for i in 0..512 {
            let to = TABLES + (level + 1) * 0x1000;
            memory.write_pod(TABLES + level * 0x1000 + i * 8, to | 3).unwrap();
        }
    }
    for i in 0..512u64 {
        memory.write_pod(TABLES + 0x3000 + i * 8, CODE | 3).unwrap();
    }
    // What the tables cover now is the code and nothing else: SS is loaded as the null selector, which needs no table.
    state.gpr[0] = 0;
    let latency = shortest_latency(&memory, &state, &bus());
    assert!(latency < PROMPT, "{latency:?}");
}

/// Repeated string instructions with the longest count, on RAM, on devices, and around the end of addresses.
#[test]
fn repeated_string_instructions_are_kicked_out_of() {
    let places = [0x20_0000u64, 0xd000_0000, 0xfee0_0000, RAM - 3];
    for opcode in [0xa4u8, 0xa5, 0xa6, 0xaa, 0xab, 0xac, 0xad, 0xae, 0x6c, 0x6e] {
        for place in places {
            for (prefix, direction) in [(0xf3u8, 0xfcu8), (0xf2, 0xfd), (0xf3, 0xfd)] {
                // again: mov rsi and rdi, rcx -1; rep …; jmp again, also where a fault ends the instruction early
                let mut code = vec![direction];
                for register in [0xbeu8, 0xbf] {
                    code.extend([0x48, register]);
                    code.extend(place.to_le_bytes());
                }
                code.extend([0x48, 0xc7, 0xc1, 0xff, 0xff, 0xff, 0xff, prefix, opcode, 0xeb, 0]);
                let back = -(code.len() as i8);
                *code.last_mut().unwrap() = back as u8;
                let (memory, state) = long_mode(&code);
                for number in [13, 14] {
                    gate(&memory, number, CODE);
                }
                let latency = shortest_latency(&memory, &state, &bus());
                assert!(latency < PROMPT, "{opcode:#x} at {place:#x}: {latency:?}");
            }
        }
    }
}

#[test]
fn code_outside_ram_is_a_crash_that_says_so() {
    // jmp rax
    for target in [0xd000_0000u64, 0xfee0_0000, RAM] {
        let (memory, mut state) = long_mode(&[0xff, 0xe0]);
        state.gpr[0] = target;
        match end_of(&memory, &state) {
            Exit::Crash(info) => assert!(info.reason.contains("outside RAM"), "{info:?}"),
            Exit::Kicked => unreachable!("nobody kicks"),
        }
    }
    // an instruction that begins in the last bytes of RAM
    let (memory, mut state) = long_mode(&[0xff, 0xe0]);
    memory.write(RAM - 3, &[0x48, 0xb8, 0]).unwrap();
    state.gpr[0] = RAM - 3;
    match end_of(&memory, &state) {
        Exit::Crash(info) => assert!(info.reason.contains("outside RAM"), "{info:?}"),
        Exit::Kicked => unreachable!("nobody kicks"),
    }
}

/// One vCPU runs random code, another and a device copy other random code over it all the while.
#[test]
fn code_that_others_change_all_the_time_does_no_harm() {
    const PAGE: u64 = 0x20_0000;
    const SOURCES: u64 = 0x28_0000;
    const COPIES: u64 = 16;
    const HANDLER: u64 = 0x2_0000;
    // again: mov ebx, SOURCES; next: mov esi, ebx; mov edi, PAGE; mov ecx, 512; rep movsq; add ebx, 0x1000;
    // cmp ebx, the end; jb next; jmp again
    let mut copier = vec![0xfc, 0xbb];
    copier.extend((SOURCES as u32).to_le_bytes());
    copier.extend([0x89, 0xde, 0xbf]);
    copier.extend((PAGE as u32).to_le_bytes());
    copier.extend([0xb9, 0, 2, 0, 0, 0xf3, 0x48, 0xa5, 0x81, 0xc3, 0, 0x10, 0, 0, 0x81, 0xfb]);
    copier.extend(((SOURCES + COPIES * 0x1000) as u32).to_le_bytes());
    copier.extend([0x72, 0xe1, 0xeb, 0xda]);
    // add dword [HANDLER - 8], 0x4f; mov eax, [HANDLER - 8]; and eax, 0xfff; add eax, PAGE; mov esp, 0x9000; jmp rax
    let mut handler = vec![0x83, 0x04, 0x25];
    handler.extend((HANDLER as u32 - 8).to_le_bytes());
    handler.extend([0x4f, 0x8b, 0x04, 0x25]);
    handler.extend((HANDLER as u32 - 8).to_le_bytes());
    handler.extend([0x25, 0xff, 0x0f, 0, 0, 0x05]);
    handler.extend((PAGE as u32).to_le_bytes());
    handler.extend([0xbc, 0, 0x90, 0, 0, 0xff, 0xe0]);
    let (memory, state) = long_mode(&copier);
    let fill = |memory: &GuestMemory, random: &mut Random| {
        for copy in 0..COPIES {
            let code = super::code::program(random, 64, 0x1000, RAM);
            memory.write(SOURCES + copy * 0x1000, &code[..0x1000]).unwrap();
        }
    };
    let (again, _) = long_mode(&copier);
    let mut start = vec![0; 0x3_0000];
    again.read(0, &mut start).unwrap();
    let whole = |memory: &GuestMemory| {
        memory.write(0, &start).unwrap();
        memory.write(HANDLER, &handler).unwrap();
        for number in 0..32 {
            gate(memory, number, HANDLER);
        }
    };
    fill(&memory, &mut Random(7));
    whole(&memory);
    let engine = SoftEngine::promoting(&memory, 1).unwrap();
    let (kickers, ready) = std::sync::mpsc::channel();
    let stop = AtomicU64::new(0);
    let runs: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2u32)
            .map(|id| {
                let (kickers, engine, memory, stop, whole) = (kickers.clone(), &engine, &memory, &stop, &whole);
                let mut state = state.clone();
                if id == 0 {
                    state.rip = PAGE;
                    state.gpr[4] = 0x9000;
                }
                scope.spawn(move || {
                    let cpuid = engine.supported_cpuid().unwrap();
                    let mut vcpu = engine.create_vcpu(&VcpuConfig { id, count: 2, cpuid }).unwrap();
                    kickers.send(vcpu.kicker()).unwrap();
                    let mut runs = 0;
                    while stop.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                        // What the last run destroyed is there again.
                        whole(memory);
                        vcpu.set_state(&state).unwrap();
                        vcpu.run(&bus()).unwrap();
                        runs += 1;
                    }
                    let exits = vcpu.stats().exits;
                    (runs, exits.get("translated_blocks").copied().unwrap_or(0))
                })
            })
            .collect();
        let kickers = [ready.recv().unwrap(), ready.recv().unwrap()];
        let end = std::time::Instant::now() + Duration::from_millis(1500);
        let mut random = Random(8);
        while std::time::Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
            memory.write_pod(PAGE + random.below(0xff8), random.next()).unwrap();
            if random.chance(10) {
                fill(&memory, &mut random);
                kickers.iter().for_each(|kicker| kicker.kick());
            }
        }
        stop.store(1, std::sync::atomic::Ordering::SeqCst);
        while !threads.iter().all(|thread| thread.is_finished()) {
            kickers.iter().for_each(|kicker| kicker.kick());
            std::thread::sleep(Duration::from_millis(1));
        }
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    println!("runs, translated blocks: {runs:?}");
    assert!(runs[0].1 > 1000);
}

/// The check that random guests run under is one.
#[test]
fn an_access_where_none_is_allowed_ends_the_process() {
    use std::os::unix::process::ExitStatusExt;
    let run = |allowed: &str| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "directed::guest_with_checked_accesses", "--ignored"])
            .env("VIREO_HOSTILE_ALLOWED", allowed)
            .output()
            .unwrap()
            .status
    };
    assert!(run(&u64::MAX.to_string()).success());
    assert_eq!(run(&(1 << 20).to_string()).signal(), Some(4), "SIGILL");
}

#[test]
#[ignore = "started by an_access_where_none_is_allowed_ends_the_process"]
fn guest_with_checked_accesses() {
    let Some(allowed) = std::env::var("VIREO_HOSTILE_ALLOWED").ok().and_then(|a| a.parse().ok()) else { return };
    // MOV [RDI], RCX; UD2, for which there is no handler
    let (memory, mut state) = long_mode(&[0x48, 0x89, 0x0f, 0x0f, 0x0b]);
    state.gpr[1] = 7;
    state.gpr[7] = 2 << 20;
    let engine = SoftEngine::promoting(&memory, 1).unwrap();
    engine.check_accesses(allowed);
    let cpuid = engine.supported_cpuid().unwrap();
    let mut vcpu = engine.create_vcpu(&VcpuConfig { id: 0, count: 1, cpuid }).unwrap();
    vcpu.set_state(&state).unwrap();
    assert!(matches!(vcpu.run(&bus()).unwrap(), Exit::Crash(_)));
    assert_eq!(memory.read_pod::<u64>(2 << 20).unwrap(), 7);
}
