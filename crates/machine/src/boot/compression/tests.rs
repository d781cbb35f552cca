use std::io::Write;

use proptest::prelude::*;

use super::*;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut out = xz2::write::XzEncoder::new(Vec::new(), 0);
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(data, 1).unwrap()
}

/// A legacy frame of blocks that hold literals only: a token, length bytes, the data (LZ4 block format).
fn lz4(data: &[u8]) -> Vec<u8> {
    let mut out = LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
    for chunk in data.chunks(1 << 20) {
        let mut block = vec![0xf0];
        let mut rest = chunk.len() as i64 - 15;
        if rest < 0 {
            block[0] = (chunk.len() as u8) << 4;
        }
        while rest >= 0 {
            block.push(rest.min(255) as u8);
            rest -= 255;
        }
        block.extend_from_slice(chunk);
        out.extend((block.len() as u32).to_le_bytes());
        out.extend(block);
    }
    out
}

fn sample() -> Vec<u8> {
    (0..3_000_000u32).map(|i| (i.wrapping_mul(i) >> 11) as u8).collect()
}

#[test]
fn each_format_comes_back_and_stops_at_its_end() {
    let data = sample();
    for (format, packed) in [
        (Compression::Gzip, gzip(&data)),
        (Compression::Xz, xz(&data)),
        (Compression::Zstd, zstd(&data)),
        (Compression::Lz4, lz4(&data)),
    ] {
        assert_eq!(Compression::detect(&packed), Some(format));
        let mut input = packed.clone();
        let zeros = if format == Compression::Lz4 { 4 } else { 0 };
        input.extend_from_slice(&[0, 0, 0, 0, b'r', b'e', b's', b't']);
        let mut rest = &input[..];
        let mut out = Vec::new();
        format.decode(&mut rest).unwrap().read_to_end(&mut out).unwrap();
        assert!(out == data, "{}", format.name());
        assert_eq!(rest, &[0, 0, 0, 0, b'r', b'e', b's', b't'][zeros..], "{}", format.name());
    }
}

#[test]
fn truncation_is_an_error() {
    let data = sample();
    for (format, packed) in [
        (Compression::Gzip, gzip(&data)),
        (Compression::Xz, xz(&data)),
        (Compression::Zstd, zstd(&data)),
        (Compression::Lz4, lz4(&data)),
    ] {
        let cut = &packed[..packed.len() / 2];
        let result = format.decode(cut).and_then(|mut d| io::copy(&mut d, &mut io::sink()));
        assert!(result.is_err(), "{}", format.name());
    }
}

proptest! {
    #[test]
    fn garbage_never_panics_nor_runs_on(which in 0..MAGICS.len(), body in prop::collection::vec(any::<u8>(), 0..400)) {
        let (magic, format) = MAGICS[which];
        let bytes = [magic, &body].concat();
        if let Ok(decoder) = format.decode(&bytes[..]) {
            let _ = io::copy(&mut decoder.take(64 << 20), &mut io::sink());
        }
    }
}
