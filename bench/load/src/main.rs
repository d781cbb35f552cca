//! Makes load in the guest. Linked statically, it runs beside busybox in an initial ramdisk; its workloads run on
//! the host as well.
//!
//! Every test prints `begin NAME` when it starts and `end NAME BYTES` when it is over, for the host to measure the
//! time in between on its own clock: a guest's clock is part of what is tested. [`work`] prints more.
#![allow(unsafe_code)]

mod work;

use std::{
    env,
    error::Error,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::fs::{FileExt, OpenOptionsExt},
    thread,
};

/// As in Linux's headers for x86.
const O_DIRECT: i32 = 0o40000;
/// What direct I/O may ask of a buffer's address.
const ALIGNMENT: usize = 4096;
/// Bytes that one call moves over a connection.
const CHUNK: usize = 256 << 10;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const USAGE: &str = "\
usage: load disk NAME DEVICE read|write seq|rand BLOCK_BYTES TOTAL_BYTES THREADS
       load tcp NAME ADDRESS:PORT down|up TOTAL_BYTES
       load workloads
       load work NAME FOLDER SCALE
       load nothing";

fn main() -> Result<()> {
    let args: Vec<String> = env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (program, args) = args.split_first().ok_or(USAGE)?;
    match args[..] {
        ["disk", name, device, direction, order, block, total, threads] => {
            let pattern = Pattern {
                write: one_of(direction, ["read", "write"])? == 1,
                random: one_of(order, ["seq", "rand"])? == 1,
                block: block.parse()?,
                total: total.parse()?,
            };
            disk(name, device, &pattern, threads.parse()?)
        }
        ["tcp", name, server, direction, total] => {
            tcp(name, server, one_of(direction, ["down", "up"])? == 1, total.parse()?)
        }
        ["workloads"] => {
            work::list();
            Ok(())
        }
        ["work", name, folder, scale] => work::run(program, name, folder, scale.parse()?),
        ["nothing"] => Ok(()),
        _ => Err(USAGE.into()),
    }
}

fn one_of(word: &str, words: [&str; 2]) -> Result<usize> {
    words.iter().position(|w| *w == word).ok_or_else(|| format!("'{word}' is none of {words:?}\n{USAGE}").into())
}

struct Pattern {
    write: bool,
    random: bool,
    block: usize,
    /// Bytes, all threads together.
    total: u64,
}

fn disk(name: &str, device: &str, pattern: &Pattern, threads: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(pattern.write).custom_flags(O_DIRECT).open(device)?;
    let blocks = size_of(device)? / pattern.block as u64;
    if blocks == 0 || threads == 0 {
        return Err(format!("{device} holds no block of {} bytes", pattern.block).into());
    }
    println!("begin {name}");
    let done: Result<u64> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|id| {
                scope.spawn({
                    let file = &file;
                    move || work(file, pattern, blocks, id, threads)
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().map_err(|_| "a thread panicked")?).sum()
    });
    println!("end {name} {}", done?);
    Ok(())
}

/// A block device has no length in its metadata; its end does.
fn size_of(device: &str) -> io::Result<u64> {
    io::Seek::seek(&mut File::open(device)?, io::SeekFrom::End(0))
}

/// One of `threads`, which together go over the whole disk.
fn work(file: &File, pattern: &Pattern, blocks: u64, id: u64, threads: u64) -> Result<u64> {
    let mut memory = vec![0x5a; pattern.block + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut memory[start..start + pattern.block];
    let mut random = 0x9e37_79b9_7f4a_7c15 ^ (id + 1);
    let count = pattern.total / pattern.block as u64 / threads;
    for turn in 0..count {
        let block = if pattern.random { next(&mut random) } else { turn * threads + id } % blocks;
        let offset = block * pattern.block as u64;
        if pattern.write { file.write_all_at(buffer, offset)? } else { file.read_exact_at(buffer, offset)? }
    }
    Ok(count * pattern.block as u64)
}

/// Xorshift (Marsaglia, 2003): the same places in every run.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// The server sends (or takes) as many bytes as it is told in the first 16: direction and count. An upload ends when
/// the server has said that all of it came.
fn tcp(name: &str, server: &str, up: bool, total: u64) -> Result<()> {
    let mut stream = TcpStream::connect(server)?;
    let mut chunk = vec![0x5a; CHUNK];
    println!("begin {name}");
    stream.write_all(&[u64::from(up).to_le_bytes(), total.to_le_bytes()].concat())?;
    let mut moved = 0;
    if up {
        while moved < total {
            let piece = (total - moved).min(CHUNK as u64) as usize;
            stream.write_all(&chunk[..piece])?;
            moved += piece as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        let mut count = [0; 8];
        stream.read_exact(&mut count)?;
        moved = u64::from_le_bytes(count);
    } else {
        loop {
            match stream.read(&mut chunk)? {
                0 => break,
                count => moved += count as u64,
            }
        }
    }
    if moved != total {
        return Err(format!("{moved} of {total} bytes came through").into());
    }
    println!("end {name} {moved}");
    Ok(())
}
