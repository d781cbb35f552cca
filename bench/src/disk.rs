//! A virtio block device, read and written directly, without the guest's page cache.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use vireo_block::OpenOptions;
use vireo_memory::GuestSlice;

use crate::{
    guest::Guest,
    process::Line,
    report::{self, Figure},
    vmm::{Machine, Vmm},
};

struct Test {
    name: &'static str,
    /// As the load program takes them.
    direction: &'static str,
    order: &'static str,
    block: u64,
    total: u64,
    threads: u32,
}

const fn test(
    name: &'static str,
    direction: &'static str,
    order: &'static str,
    block: u64,
    total_mib: u64,
    threads: u32,
) -> Test {
    Test { name, direction, order, block, total: total_mib << 20, threads }
}

const TESTS: [Test; 8] = [
    test("read 1M", "read", "seq", 1 << 20, 1024, 1),
    test("write 1M", "write", "seq", 1 << 20, 1024, 1),
    test("read 128K", "read", "seq", 128 << 10, 512, 1),
    test("write 128K", "write", "seq", 128 << 10, 512, 1),
    test("random read 4K", "read", "rand", 4096, 32, 1),
    test("random write 4K", "write", "rand", 4096, 32, 1),
    test("random read 4K, 8 at once", "read", "rand", 4096, 32, 8),
    test("random write 4K, 8 at once", "write", "rand", 4096, 32, 8),
];
/// With busybox's dd, as anyone would.
const DD_BLOCKS: u64 = 1024;

pub fn measure(
    vmm: &Vmm,
    guest: &Guest,
    work: &Path,
    memory_mib: u64,
    disk_bytes: u64,
    scale: f64,
) -> Result<Vec<Figure>> {
    let ramdisk = work.join("disk.cpio");
    fs::write(&ramdisk, guest.ramdisk(&script(disk_bytes, scale)))?;
    let mut figures = Vec::new();
    for format in ["raw", "qcow2"] {
        let disk = scratch(work, format, disk_bytes)?;
        let machine = Machine { disk: Some((&disk, format)), ..Machine::new(&guest.kernel, &ramdisk, memory_mib) };
        let finished = vmm.run(&machine)?;
        let moved = moved(&finished.lines)?;
        ensure!(moved.len() == TESTS.len() + 2, "the guest ran {} tests of {}", moved.len(), TESTS.len() + 2);
        figures.extend(moved.into_iter().map(|figure| Figure { name: format!("{format}: {}", figure.name), ..figure }));
        figures.push(report::memory(&format!("{format} disk"), finished.outside_guest_bytes));
    }
    Ok(figures)
}

fn script(disk_bytes: u64, scale: f64) -> String {
    let mut script = String::from("test -b /dev/vda\n");
    let count = ((DD_BLOCKS as f64 * scale) as u64).min(disk_bytes >> 20).max(1);
    for (name, arguments) in
        [("read", "if=/dev/vda of=/dev/null iflag=direct"), ("write", "if=/dev/zero of=/dev/vda oflag=direct")]
    {
        script.push_str(&format!(
            "echo 'begin dd {name} 1M'\ndd {arguments} bs=1M count={count} 2>/dev/null\necho 'end dd {name} 1M {}'\n",
            count << 20
        ));
    }
    for test in &TESTS {
        let total = ((test.total as f64 * scale) as u64).next_multiple_of(test.block * u64::from(test.threads));
        let Test { name, direction, order, block, threads, .. } = test;
        script.push_str(&format!("load disk '{name}' /dev/vda {direction} {order} {block} {total} {threads}\n"));
    }
    script
}

/// What the guest moved between each `begin NAME` and its `end NAME BYTES`.
pub fn moved(lines: &[Line]) -> Result<Vec<Figure>> {
    let mut begun = None;
    let mut figures = Vec::new();
    for line in lines {
        if let Some(name) = line.text.strip_prefix("begin ") {
            begun = Some((name, line));
        } else if let Some(rest) = line.text.strip_prefix("end ") {
            let (name, bytes) = rest.rsplit_once(' ').context("a line of the guest without bytes")?;
            let (_, start) = begun.take().filter(|(begun, _)| *begun == name).context("an end without a beginning")?;
            let (wall, cpu) = (line.at - start.at, line.cpu.saturating_sub(start.cpu));
            figures.push(report::rate(name.into(), bytes.parse()?, wall, cpu));
        }
    }
    Ok(figures)
}

/// A disk full of data that are not zeroes, made once for all rounds and both VMMs.
fn scratch(work: &Path, format: &str, bytes: u64) -> Result<PathBuf> {
    let path = work.join(format!("scratch-{}M.{format}", bytes >> 20));
    if path.exists() {
        return Ok(path);
    }
    let unfinished = path.with_extension("new");
    let _ = fs::remove_file(&unfinished);
    let kind = if format == "raw" {
        fs::File::create(&unfinished)?.set_len(bytes)?;
        vireo_block::Format::Raw
    } else {
        vireo_block::create_qcow2(&unfinished, bytes, None)?;
        vireo_block::Format::Qcow2
    };
    let disk = vireo_block::open(&unfinished, OpenOptions { format: Some(kind), read_only: false })?;
    let mut chunk: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8 | 1).collect();
    for offset in (0..bytes).step_by(chunk.len()) {
        let len = (bytes - offset).min(chunk.len() as u64) as usize;
        disk.write(offset, &[GuestSlice::from_host(&mut chunk[..len])])?;
    }
    disk.flush()?;
    drop(disk);
    fs::rename(&unfinished, &path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_rate_is_bytes_over_time_between_the_lines() {
        let start = Instant::now();
        let line = |millis, cpu, text: &str| {
            let (at, cpu) = (start + Duration::from_millis(millis), Duration::from_millis(cpu));
            Line { at, cpu, text: text.into() }
        };
        let lines = [line(0, 0, "bench: init"), line(10, 5, "begin read 1M"), line(510, 255, "end read 1M 100000000")];
        let figures = moved(&lines).unwrap();
        assert_eq!((figures[0].name.as_str(), figures[0].value, figures[0].by_cpu), ("read 1M", 200.0, Some(400.0)));
        assert!(moved(&lines[2..]).is_err());
    }

    #[test]
    fn a_scratch_disk_has_its_size_and_no_holes() {
        let folder = tempfile::tempdir().unwrap();
        for format in ["raw", "qcow2"] {
            let path = scratch(folder.path(), format, 3 << 20).unwrap();
            let disk = vireo_block::open(&path, OpenOptions { format: None, read_only: true }).unwrap();
            assert_eq!(disk.size_bytes(), 3 << 20);
            let mut data = vec![0; 3 << 20];
            disk.read(0, &[GuestSlice::from_host(&mut data)]).unwrap();
            assert!(!data.contains(&0));
        }
    }
}
