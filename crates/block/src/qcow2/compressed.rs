//! Compressed clusters: read only, and never more than a cluster comes out.

use std::{
    collections::VecDeque,
    io::Read,
    sync::{Arc, Mutex, PoisonError},
};

use flate2::{Decompress, FlushDecompress, Status};

use super::header::Compression;

/// Inflates one cluster; the text says what is wrong.
pub fn decompress(kind: Compression, data: &[u8], cluster_bytes: usize) -> Result<Vec<u8>, String> {
    let mut out = vec![0; cluster_bytes];
    match kind {
        Compression::Deflate => inflate(data, &mut out)?,
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(data).map_err(|e| e.to_string())?;
            // The window that a frame asks for is memory: no cluster needs more than 2 MiB.
            decoder.window_log_max(22).map_err(|e| e.to_string())?;
            decoder.read_exact(&mut out).map_err(|e| e.to_string())?;
        }
    }
    Ok(out)
}

/// Raw deflate, without zlib's header.
fn inflate(data: &[u8], out: &mut [u8]) -> Result<(), String> {
    let mut stream = Decompress::new(false);
    loop {
        let (consumed, produced) = (stream.total_in() as usize, stream.total_out() as usize);
        let (input, room) = (data.get(consumed..).unwrap_or(&[]), &mut out[produced..]);
        let status = stream.decompress(input, room, FlushDecompress::Finish).map_err(|e| e.to_string())?;
        let done = stream.total_out() as usize;
        if done == out.len() {
            return Ok(());
        }
        let stuck = stream.total_in() as usize == consumed && done == produced;
        if status == Status::StreamEnd || stuck {
            return Err(format!("only {done} of {} bytes come out of a compressed cluster", out.len()));
        }
    }
}

/// The clusters that were decompressed last: a guest reads them in small pieces.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<(u64, Arc<[u8]>)>>);

const RECENT_BYTES: usize = 1 << 20;

impl Recent {
    pub fn get(&self, entry: u64) -> Option<Arc<[u8]>> {
        let recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        recent.iter().find(|(e, _)| *e == entry).map(|(_, data)| data.clone())
    }

    pub fn put(&self, entry: u64, data: Arc<[u8]>) {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while recent.len() * data.len() >= RECENT_BYTES && !recent.is_empty() {
            recent.pop_front();
        }
        recent.push_back((entry, data));
    }
}
