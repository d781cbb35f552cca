/// The steps of a build, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Fetching and verifying the archive's signed indices.
    Indices,
    /// Choosing the packages. Takes no noticeable time.
    Resolve,
    /// Fetching packages; counted in bytes.
    Download,
    /// Unpacking what the guest's own dpkg needs to run; counted in packages.
    Bootstrap,
    /// The guest's dpkg unpacks and configures; counted in packages, each twice.
    Install,
    /// Writing the root file system.
    FileSystem,
    /// Checking sizes and sums, and moving the image to its name.
    Finish,
}

impl Step {
    /// What a progress bar shows.
    pub fn title(self) -> &'static str {
        match self {
            Step::Indices => "Reading the archive's signed index",
            Step::Resolve => "Choosing packages",
            Step::Download => "Downloading packages",
            Step::Bootstrap => "Unpacking the base",
            Step::Install => "Installing packages",
            Step::FileSystem => "Writing the file system",
            Step::Finish => "Finishing",
        }
    }

    /// Whether the step counts bytes (else it counts things).
    pub fn counts_bytes(self) -> bool {
        self == Step::Download
    }
}

/// Where a build tells how far it is, and asks whether it shall go on. Called from several threads.
pub trait Progress: Sync {
    /// A step begins. `total` is 0 where the step does not count.
    fn step(&self, step: Step, total: u64);

    /// The current step has done `done` of `total`.
    fn advance(&self, done: u64, total: u64);

    /// Something the user should know that is no error.
    fn note(&self, text: &str);

    /// Asked often; `true` ends the build with [`BuildError::Cancelled`](crate::BuildError::Cancelled), and nothing is left.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: Step, _: u64) {}
    fn advance(&self, _: u64, _: u64) {}
    fn note(&self, _: &str) {}
}
