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
    report::{Figure, Unit},
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
        let machine = Machine {
            kernel: &guest.kernel,
            ramdisk: &ramdisk,
            memory_mib,
            disk: Some((&disk, format)),
            user_network: false,
        };
        let finished = vmm.run(&machine)?;
        let rates = rates(&finished.lines.iter().map(|l| (l.at, l.text.as_str())).collect::<Vec<_>>())?;
        ensure!(rates.len() == TESTS.len() + 2, "the guest ran {} tests of {}", rates.len(), TESTS.len() + 2);
        let unit = Unit::MegaBytesPerSecond;
        figures.extend(rates.into_iter().map(|(name, value)| Figure {
            name: format!("{format}: {name}"),
            unit,
            value,
        }));
        let value = finished.outside_guest_bytes as f64 / f64::from(1 << 20);
        figures.push(Figure {
            name: format!("peak memory outside guest RAM, {format} disk"),
            unit: Unit::MebiBytes,
            value,
        });
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

/// MB/s between each `begin NAME` and its `end NAME BYTES`.
pub fn rates(lines: &[(std::time::Instant, &str)]) -> Result<Vec<(String, f64)>> {
    let mut begun = None;
    let mut rates = Vec::new();
    for (at, text) in lines {
        if let Some(name) = text.strip_prefix("begin ") {
            begun = Some((name, *at));
        } else if let Some(rest) = text.strip_prefix("end ") {
            let (name, bytes) = rest.rsplit_once(' ').context("a line of the guest without bytes")?;
            let (_, start) = begun.take().filter(|(begun, _)| *begun == name).context("an end without a beginning")?;
            rates.push((name.to_owned(), bytes.parse::<f64>()? / 1e6 / (*at - start).as_secs_f64()));
        }
    }
    Ok(rates)
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
        let lines = [
            (start, "bench: init"),
            (start, "begin read 1M"),
            (start + Duration::from_millis(500), "end read 1M 100000000"),
        ];
        assert_eq!(rates(&lines).unwrap(), [("read 1M".to_owned(), 200.0)]);
        assert!(rates(&lines[2..]).is_err());
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
