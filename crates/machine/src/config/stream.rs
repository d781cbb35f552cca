use std::{
    fmt,
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

/// The host's end of a character device: bytes from the guest and, if there is an input, bytes to it. Clones are
/// the same stream, so that it survives the rebuilding of a machine.
#[derive(Clone)]
pub struct Stream {
    input: Option<Arc<OwnedFd>>,
    output: Arc<Mutex<dyn Write + Send>>,
    failure: Arc<OnceLock<String>>,
}

impl Stream {
    /// `input` must be something that `poll` knows: a pipe, a terminal, a socket.
    pub fn new(input: Option<OwnedFd>, output: impl Write + Send + 'static) -> Self {
        Self { input: input.map(Arc::new), output: Arc::new(Mutex::new(output)), failure: Arc::default() }
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
        StreamOutput { output: self.output.clone(), failure: self.failure.clone() }
    }

    /// Why output was lost, if some was. A reader that has gone wanted no more.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("input", &self.input).finish_non_exhaustive()
    }
}

/// The writing end of a [`Stream`]; what is written is flushed at once.
pub struct StreamOutput {
    output: Arc<Mutex<dyn Write + Send>>,
    failure: Arc<OnceLock<String>>,
}

impl Write for StreamOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let result = output.write(bytes).and_then(|len| output.flush().map(|()| len));
        if let Err(error) = &result
            && !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::Interrupted)
        {
            self.failure.get_or_init(|| error.to_string());
        }
        result
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}
