//! The kernel: system calls, clocks, processes, pipes, memory, signals, files.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    process::Command,
    ptr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
};

use super::Run;

const PAGE: usize = 4096;

pub fn system_calls(run: &Run) -> u64 {
    // SAFETY: getppid has no arguments and no effects.
    let parent = || unsafe { libc::syscall(libc::SYS_getppid) };
    let first = parent();
    (0..run.rounds).filter(|_| parent() == first).count() as u64
}

pub fn clock(run: &Run) -> u64 {
    let mut last = 0;
    let mut forward = 0;
    for _ in 0..run.rounds {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `now` is alive and writable.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
        let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        forward += u64::from(now >= last);
        last = now;
    }
    forward
}

/// A child that does `work`, and its exit code.
fn child(work: impl FnOnce() -> i32) -> i32 {
    // SAFETY: this process has one thread when it forks, and the child leaves by _exit.
    match unsafe { libc::fork() } {
        -1 => panic!("cannot fork: {}", io::Error::last_os_error()),
        // SAFETY: it ends the child without running what the parent wants run at its end.
        0 => unsafe { libc::_exit(work()) },
        pid => exit_code(pid),
    }
}

fn exit_code(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is alive and writable.
    let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
    assert!(waited == pid && libc::WIFEXITED(status), "a child ended with status {status:#x}");
    libc::WEXITSTATUS(status)
}

pub fn fork(run: &Run) -> u64 {
    (0..run.rounds).map(|turn| child(|| turn as i32 & 7) as u64).sum()
}

/// The child of a process with 4 MiB writes to half of it.
pub fn copy_on_write(run: &Run) -> u64 {
    let map = Map::new(4 << 20);
    map.touch(1);
    let mut sum = 0;
    for _ in 0..run.rounds {
        let code = child(|| {
            for page in (0..map.bytes / PAGE).step_by(2) {
                map.at(page * PAGE).store(2, Ordering::Relaxed);
            }
            (map.at(0).load(Ordering::Relaxed) + map.at(PAGE).load(Ordering::Relaxed)) as i32
        });
        sum += code as u64 + map.at(0).load(Ordering::Relaxed);
    }
    sum
}

pub fn exec(run: &Run) -> u64 {
    let code = |_| Command::new(run.program).arg("nothing").status().ok().and_then(|status| status.code());
    (0..run.rounds).map(code).filter(|code| *code == Some(0)).count() as u64
}

/// Two ends of a pipe.
fn pipe() -> (io::PipeReader, io::PipeWriter) {
    io::pipe().expect("no pipe")
}

/// A byte to another process and back.
pub fn pipe_turns(run: &Run) -> u64 {
    let ((mut here, mut to_here), (mut there, mut to_there)) = (pipe(), pipe());
    // SAFETY: this process has one thread, and the child leaves by _exit.
    let pid = unsafe { libc::fork() };
    let mut byte = [0u8];
    if pid == 0 {
        drop((to_there, here));
        while there.read_exact(&mut byte).is_ok() {
            byte[0] = byte[0].wrapping_add(1);
            if to_here.write_all(&byte).is_err() {
                break;
            }
        }
        // SAFETY: it ends the child without running what the parent wants run at its end.
        unsafe { libc::_exit(0) }
    }
    drop((to_here, there));
    let mut sum = 0;
    for turn in 0..run.rounds {
        to_there.write_all(&[turn as u8]).expect("the other process is gone");
        here.read_exact(&mut byte).expect("the other process is gone");
        sum += u64::from(byte[0]);
    }
    drop(to_there);
    sum + exit_code(pid) as u64
}

/// 64 KiB at a time from one process to another.
pub fn pipe_bulk(run: &Run) -> u64 {
    let (mut from, mut to) = pipe();
    // SAFETY: this process has one thread, and the child leaves by _exit.
    let pid = unsafe { libc::fork() };
    let mut chunk = vec![3u8; 64 << 10];
    if pid == 0 {
        drop(from);
        let sent = (0..run.rounds).all(|_| to.write_all(&chunk).is_ok());
        // SAFETY: it ends the child without running what the parent wants run at its end.
        unsafe { libc::_exit(i32::from(!sent)) }
    }
    drop(to);
    let mut sum = 0;
    while let Ok(count @ 1..) = from.read(&mut chunk) {
        sum += chunk[..count].len() as u64 * u64::from(chunk[count - 1]);
    }
    sum + exit_code(pid) as u64
}

/// Messages of 200 bytes over a socket between two threads.
pub fn sockets(run: &Run) -> u64 {
    let (mut here, mut there) = UnixStream::pair().expect("no socket");
    let mut message = [7u8; 200];
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut message = [0; 200];
            while there.read_exact(&mut message).is_ok() && there.write_all(&message).is_ok() {}
        });
        for turn in 0..run.rounds {
            message[0] = message[0].wrapping_add(turn as u8);
            here.write_all(&message).and_then(|()| here.read_exact(&mut message)).expect("the other thread is gone");
        }
        drop(here);
    });
    message.iter().map(|byte| u64::from(*byte)).sum()
}

/// Two threads that wait for each other on futexes.
pub fn context_switches(run: &Run) -> u64 {
    let turn = AtomicU64::new(0);
    let (rounds, main) = (run.rounds, thread::current());
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            for round in 0..rounds {
                while turn.load(Ordering::Acquire) != 2 * round + 1 {
                    thread::park();
                }
                turn.store(2 * round + 2, Ordering::Release);
                main.unpark();
            }
        });
        for round in 0..rounds {
            turn.store(2 * round + 1, Ordering::Release);
            other.thread().unpark();
            while turn.load(Ordering::Acquire) != 2 * round + 2 {
                thread::park();
            }
        }
    });
    turn.into_inner()
}

pub fn threads(run: &Run) -> u64 {
    (0..run.rounds).map(|turn| thread::spawn(move || turn & 7).join().unwrap_or(100)).sum()
}

/// Anonymous memory in pages of 4 KiB.
struct Map {
    start: *mut u8,
    bytes: usize,
}

impl Map {
    fn new(bytes: usize) -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping wherever the kernel likes it.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
        assert!(start != libc::MAP_FAILED, "no memory: {}", io::Error::last_os_error());
        // SAFETY: it is the mapping made above; huge pages would make the number of faults a matter of luck.
        unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
        Self { start: start.cast(), bytes }
    }

    fn at(&self, offset: usize) -> &AtomicU64 {
        assert!(offset + 8 <= self.bytes && offset.is_multiple_of(8));
        // SAFETY: aligned and within the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.start.add(offset).cast()) }
    }

    fn touch(&self, value: u64) {
        for page in 0..self.bytes / PAGE {
            self.at(page * PAGE).fetch_add(value, Ordering::Relaxed);
        }
    }

    fn protect(&self, access: libc::c_int) {
        // SAFETY: it is this mapping.
        assert!(unsafe { libc::mprotect(self.start.cast(), self.bytes, access) } == 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nobody else has the mapping.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

pub fn page_faults(run: &Run) -> u64 {
    let mut sum = 0;
    for turn in 0..run.rounds {
        let map = Map::new(8 << 20);
        map.touch(turn);
        sum += map.at(4 << 20).load(Ordering::Relaxed);
    }
    sum
}

/// Map, touch, protect, unmap: much change for few pages.
pub fn mappings(run: &Run) -> u64 {
    let mut sum = 0;
    for turn in 0..run.rounds {
        let map = Map::new(64 << 10);
        map.at(PAGE).store(turn & 0xff, Ordering::Relaxed);
        map.protect(libc::PROT_READ);
        sum += map.at(PAGE).load(Ordering::Relaxed);
    }
    sum
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);
static GUARDED: AtomicUsize = AtomicUsize::new(0);

fn catch(signal: libc::c_int, handler: extern "C" fn(libc::c_int)) {
    // SAFETY: plain integers, for which zeroes are a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    // SAFETY: handlers here call nothing but mprotect, and touch atomics only.
    assert!(unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } == 0);
}

pub fn signals(run: &Run) -> u64 {
    extern "C" fn count(_: libc::c_int) {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
    }
    catch(libc::SIGUSR1, count);
    for _ in 0..run.rounds {
        // SAFETY: the signal is caught.
        unsafe { libc::raise(libc::SIGUSR1) };
    }
    CAUGHT.load(Ordering::Relaxed)
}

/// Writes to a page that must not be written, as garbage collectors do; the handler lets them.
pub fn faults_caught(run: &Run) -> u64 {
    extern "C" fn allow(_: libc::c_int) {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
        let page = GUARDED.load(Ordering::Relaxed) as *mut libc::c_void;
        // SAFETY: the page is one of this test's own mapping.
        unsafe { libc::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE) };
    }
    let map = Map::new(PAGE);
    map.touch(1);
    GUARDED.store(map.start as usize, Ordering::Relaxed);
    catch(libc::SIGSEGV, allow);
    for turn in 0..run.rounds {
        map.protect(libc::PROT_READ);
        map.at(64).store(turn, Ordering::Relaxed);
    }
    CAUGHT.load(Ordering::Relaxed) << 32 | map.at(64).load(Ordering::Relaxed)
}

/// A file in memory, 4 KiB at a time: written in order, read in order, read at random.
pub fn file_data(run: &Run) -> u64 {
    const BLOCKS: u64 = 512;
    let path = run.folder.join("data");
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("no file");
    let mut block = vec![0u8; PAGE];
    let mut sum = 0u64;
    for turn in 0..run.rounds {
        file.rewind().expect("no start");
        for number in 0..BLOCKS {
            block[9] = (number ^ turn) as u8;
            file.write_all(&block).expect("cannot write");
        }
        for number in 0..BLOCKS {
            file.read_exact_at(&mut block, (number * 37 % BLOCKS) * PAGE as u64).expect("cannot read");
            sum = sum.wrapping_mul(3).wrapping_add(u64::from(block[9]));
        }
    }
    let _ = fs::remove_file(path);
    sum
}

/// Make, write, rename, look at, list and remove small files.
pub fn file_names(run: &Run) -> u64 {
    let folder = run.folder.join("names");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).expect("cannot make a folder");
    let name = |number: u64| folder.join(format!("file-{number}"));
    let mut sum = 0;
    for turn in 0..run.rounds {
        fs::write(name(turn), b"some words").expect("cannot write");
        fs::rename(name(turn), name(turn + 1_000_000)).expect("cannot rename");
        sum += fs::metadata(name(turn + 1_000_000)).map_or(0, |data| data.len());
        if turn % 64 == 63 {
            sum += fs::read_dir(&folder).map_or(0, |entries| entries.count()) as u64;
            for done in turn - 63..=turn {
                fs::remove_file(name(done + 1_000_000)).expect("cannot remove");
            }
        }
    }
    let _ = fs::remove_dir_all(&folder);
    sum
}

/// Waits for one of many: 32 pipes, one of them with something in it.
pub fn poll(run: &Run) -> u64 {
    let mut pipes: Vec<_> = (0..32).map(|_| pipe()).collect();
    let entry = |end: &io::PipeReader| libc::pollfd { fd: end.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut entries: Vec<_> = pipes.iter().map(|(end, _)| entry(end)).collect();
    let mut sum = 0;
    for turn in 0..run.rounds {
        let (from, to) = &mut pipes[turn as usize * 7 % 32];
        to.write_all(&[turn as u8]).expect("cannot write");
        // SAFETY: the entries are alive, and as many as said.
        sum += unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, -1) } as u64;
        sum += entries.iter().position(|entry| entry.revents != 0).unwrap_or(100) as u64;
        let mut byte = [0];
        from.read_exact(&mut byte).expect("cannot read");
    }
    sum
}
