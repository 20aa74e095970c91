//! The signal state of a test's process, which the programs that it starts inherit: whatever
//! started the tests may ignore or block signals, as nohup, services and CI runners do.

/// The signals that tests send or wait for.
const SIGNALS: [libc::c_int; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGCHLD,
    libc::SIGTSTP,
    libc::SIGTTIN,
];

/// Runs before `main`: in a test binary that is not ours.
#[used]
#[unsafe(link_section = ".init_array")]
static DEFAULT_SIGNALS: extern "C" fn() = default_signals;

extern "C" fn default_signals() {
    for signal in SIGNALS {
        // SAFETY: the default action needs no handler, and no other thread runs yet.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mut none = std::mem::MaybeUninit::uninit();
    // SAFETY: it initialises the set.
    unsafe { libc::sigemptyset(none.as_mut_ptr()) };
    // SAFETY: the set has been initialised; the old one is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()) };
}
