use std::{
    os::fd::BorrowedFd,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::ThreadId,
};

use vireo_cpu::{CpuState, CrashInfo, Kick, MsiLine, MsiMessage, NoBus, cpuid::CpuidTable};

use super::*;

/// What vCPU 1 of [`Fake`] does; the others wait to be kicked.
#[derive(Clone, Copy)]
enum Deed {
    Crash,
    Fail,
    Panic,
    Nothing,
}

struct Fake {
    deed: Deed,
    fail_at: Option<u32>,
    entered: Arc<Mutex<Vec<(u32, u64, ThreadId)>>>,
    alive: Arc<AtomicU32>,
}

struct FakeVcpu {
    id: u32,
    deed: Deed,
    state: CpuState,
    created_on: ThreadId,
    kicked: Arc<Kicked>,
    entered: Arc<Mutex<Vec<(u32, u64, ThreadId)>>>,
    alive: Arc<AtomicU32>,
}

#[derive(Default)]
struct Kicked(Mutex<bool>, Condvar);

impl Kick for Kicked {
    fn kick(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

impl Drop for FakeVcpu {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, _bus: &dyn Bus) -> Result<Exit, CpuError> {
        assert_eq!(self.created_on, thread::current().id());
        self.entered.lock().unwrap().push((self.id, self.state.rip, self.created_on));
        match (self.id, self.deed) {
            (1, Deed::Crash) => Ok(Exit::Crash(CrashInfo { vcpu: 1, reason: "test".into(), rip: 7, rsp: 8, cr3: 9 })),
            (1, Deed::Fail) => Err(CpuError::Other("test".into())),
            (1, Deed::Panic) => panic!("on purpose"),
            _ => {
                let mut kicked = self.kicked.0.lock().unwrap();
                while !std::mem::take(&mut *kicked) {
                    kicked = self.kicked.1.wait(kicked).unwrap();
                }
                Ok(Exit::Kicked)
            }
        }
    }
    fn state(&self) -> Result<CpuState, CpuError> {
        Ok(self.state.clone())
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), CpuError> {
        self.state = state.clone();
        Ok(())
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicked.clone()
    }
    fn stats(&self) -> RunStats {
        RunStats { instructions: Some(10 + u64::from(self.id)), exits: [("kick", 1)].into() }
    }
}

impl Engine for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn create_vcpu(&self, config: &VcpuConfig) -> Result<Box<dyn Vcpu>, CpuError> {
        if self.fail_at == Some(config.id) {
            return Err(CpuError::Other("no more".into()));
        }
        self.alive.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeVcpu {
            id: config.id,
            deed: self.deed,
            state: CpuState::reset(),
            created_on: thread::current().id(),
            kicked: Arc::default(),
            entered: self.entered.clone(),
            alive: self.alive.clone(),
        }))
    }
    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, CpuError> {
        Err(CpuError::Other("none".into()))
    }
    fn send_msi(&self, _message: MsiMessage) {}
    fn ioeventfd(&self, _gpa: u64, _len: u32, _fd: BorrowedFd<'_>) -> bool {
        false
    }
    fn remove_ioeventfd(&self, _gpa: u64, _len: u32, _fd: BorrowedFd<'_>) {}
    fn supported_cpuid(&self) -> Result<CpuidTable, CpuError> {
        Ok(CpuidTable::default())
    }
}

fn fake(deed: Deed) -> Fake {
    Fake { deed, fail_at: None, entered: Arc::default(), alive: Arc::default() }
}

const ENTRY: Entry = Entry::Linux64 { rip: 0x1234_5000 };

fn create(fake: Fake, count: u32) -> (Result<Vcpus, CpuError>, Arc<Events>) {
    let engine: Arc<dyn Engine> = Arc::new(fake);
    let bus: Arc<dyn Bus> = Arc::new(NoBus);
    let events = Arc::new(Events::default());
    (Vcpus::create(&engine, &bus, &events, count, ENTRY, false), events)
}

#[test]
fn each_vcpu_has_its_thread_and_only_the_first_enters_the_kernel() {
    let fake = fake(Deed::Nothing);
    let (entered, alive) = (fake.entered.clone(), fake.alive.clone());
    let (vcpus, events) = create(fake, 3);
    let vcpus = vcpus.unwrap();
    assert!(entered.lock().unwrap().is_empty());
    vcpus.start();
    while entered.lock().unwrap().len() < 3 {
        thread::yield_now();
    }
    events.finish(End::PowerOff);
    let stats = vcpus.join();
    assert_eq!(stats.instructions, Some(10 + 11 + 12));
    assert_eq!(stats.exits["kick"], 3);
    assert_eq!(alive.load(Ordering::SeqCst), 0);
    let mut entered = entered.lock().unwrap().clone();
    entered.sort_by_key(|(id, ..)| *id);
    assert_eq!(entered.iter().map(|(_, rip, _)| *rip).collect::<Vec<_>>(), [0x1234_5000, 0xfff0, 0xfff0]);
    assert!(entered[0].2 != entered[1].2 && entered[1].2 != entered[2].2);
}

#[test]
fn one_vcpu_that_ends_ends_all() {
    for (deed, expect) in [(Deed::Crash, "test"), (Deed::Fail, "test"), (Deed::Panic, "bug")] {
        let (vcpus, events) = create(fake(deed), 4);
        let vcpus = vcpus.unwrap();
        vcpus.start();
        let said = match events.wait(None, false).unwrap() {
            End::Crash(info) => info.reason,
            End::Failed(error) => error.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(said.contains(expect), "{said}");
        vcpus.join();
    }
}

#[test]
fn nothing_is_left_when_one_cannot_be_created() {
    let fake = Fake { fail_at: Some(2), ..fake(Deed::Nothing) };
    let alive = fake.alive.clone();
    assert!(create(fake, 4).0.is_err());
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}
