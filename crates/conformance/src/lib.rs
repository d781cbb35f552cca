//! What every CPU engine must do, as small guests that run on all of them with the same results.
//!
//! A guest is some assembly, a start state and the list of 32-bit values that it must report (see [`asm`]
//! for how it is written and [`machine`] for the world it finds). An engine passes the suite by a test target
//! of three lines:
//!
//! ```ignore
//! fn engine(memory: &GuestMemory) -> Option<Arc<dyn Engine>> { … }
//! vireo_conformance::suite!(engine);
//! ```
//!
//! Where an engine lacks a feature (it is not in its CPUID leaves), the guests for it are skipped, by name.
//! The suite knows the host only through its engine: real hardware, KVM's emulator and ours are judged alike.
#![allow(unsafe_code)]

mod asm;
mod guest;
pub mod guests;
mod machine;
mod runner;

pub use guest::{Expected, Guest, Start};
pub use runner::{Outcome, check, run};

/// The table of guests: from it come [`all`] and the `suite!` macro.
macro_rules! table {
    ($d:tt $( $module:ident { $($name:ident,)* } )*) => {
        /// Every guest of the suite, by module.
        pub fn all() -> Vec<Guest> {
            vec![ $( $( guests::$module::$name(), )* )* ]
        }

        /// Makes one `#[test]` for each guest, on the engine that `$engine` makes: a
        /// `fn(&GuestMemory) -> Option<Arc<dyn Engine>>`, `None` where the host has no such engine. For KVM,
        /// `$emulated` says whether it emulates ring 0: guests at which that emulator is known to err are skipped.
        #[macro_export]
        macro_rules! suite {
            ($d engine:expr) => {
                $crate::suite!($d engine, false);
            };
            ($d engine:expr, $d emulated:expr) => {
                $( mod $module {
                    #[allow(unused_imports)]
                    use super::*;
                    $(
                        #[test]
                        fn $name() {
                            $crate::check(&$crate::guests::$module::$name(), $d engine, $d emulated);
                        }
                    )*
                } )*
            };
        }
    };
}

table! { $
    real {
        arithmetic_and_flags, decimal_arithmetic, strings_to_ports, interrupts_by_ivt, segments_and_far_calls, up_to_long_mode,
    }
    exceptions {
        divide_errors, debug_traps, breakpoints, undefined_opcodes, device_not_available, double_fault,
        data_breakpoints, split_accesses, bad_stack_pointer,
        segment_faults, general_protection, jumps_to_nowhere, two_memory_operands, page_faults, triple_fault,
    }
    user {
        there_and_back, faults, fpu_and_simd_faults, device_not_available, alignment_check, syscall_sysret, io_permission, gates,
        stack_switch, null_selectors, calls_change,
    }
    paging {
        sizes, accessed_and_dirty, write_protect, no_execute, reserved_bits, invlpg, global_pages, pcid, smep_smap,
        gigabyte_pages,
    }
    paravirtual {
        steal_time_register, flush_while_halted,
    }
    io {
        port_sizes, string_ports, mmio_sizes, mmio_operands, string_between_floats,
    }
    interrupts {
        self_ipi, priorities, in_service, task_priority, shadow_of_sti, sti_before_floats, nmi, message_signalled,
        level_triggered, halt_and_wake, x2apic,
    }
    timers {
        one_shot, periodic, tsc_deadline, counts_down,
    }
    smp {
        start_by_sipi, atomic_counters, ipis_both_ways, broadcast, code_of_the_other, shootdown, patched_code, shootdowns,
    }
    contention {
        atomics_beside_code, entries_taken_away,
    }
    stepping {
        repeated_strings, loads_of_ss, watched_stacks, changed_bytes,
    }
    code {
        modified_by_itself, modified_ahead, reads_beside_code, reads_behind_aligned_writes, across_pages, local_to_global,
        moved_pages, ever_new_operands, data_beside_code,
    }
    cpu {
        identification, model_specific_registers, pat_and_tsc_writes, control_registers, time_stamp_disable, rdtscp,
        swapgs_and_bases, fsgsbase, cmpxchg_and_xadd, string_instructions, descriptor_tables, absolute_addresses, long_strings,
    }
    vectors {
        fxsave_and_fxrstor, xsave_and_xrstor, avx_state, masked_stores,
    }
    protected {
        exceptions, traps_of_old, limits, call_gates, invalid_tss, legacy_paging, invlpg_around, pae_paging,
        rings_and_sysenter, virtual_8086,
    }
}
