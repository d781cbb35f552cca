use std::{
    fmt,
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// The host's end of a character device: bytes from the guest and, if there is an input, bytes to it. Clones are
/// the same stream, so that it survives the rebuilding of a machine.
#[derive(Clone)]
pub struct Stream {
    input: Option<Arc<OwnedFd>>,
    output: Arc<Mutex<dyn Write + Send>>,
}

impl Stream {
    /// `input` must be something that `poll` knows: a pipe, a terminal, a socket.
    pub fn new(input: Option<OwnedFd>, output: impl Write + Send + 'static) -> Self {
        Self { input: input.map(Arc::new), output: Arc::new(Mutex::new(output)) }
    }

    /// Output goes to a file, which is made or emptied; there is no input.
    pub fn to_file(path: &Path) -> io::Result<Self> {
        Ok(Self::new(None, File::create(path)?))
    }

    /// A second descriptor for the input.
    pub fn input(&self) -> io::Result<Option<OwnedFd>> {
        self.input.as_ref().map(|fd| fd.try_clone()).transpose()
    }

    pub fn output(&self) -> StreamOutput {
        StreamOutput(self.output.clone())
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("input", &self.input).finish_non_exhaustive()
    }
}

/// The writing end of a [`Stream`]; what is written is flushed at once.
pub struct StreamOutput(Arc<Mutex<dyn Write + Send>>);

impl Write for StreamOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let len = output.write(bytes)?;
        output.flush()?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}
