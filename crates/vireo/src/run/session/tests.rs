use vireo_guest_protocol::Exit;

use super::*;

fn session() -> (Sender, UnixStream) {
    let (ours, guest) = UnixStream::pair().unwrap();
    (Arc::new(Mutex::new(Some(ours))), guest)
}

#[test]
fn a_signal_reaches_the_guest() {
    let (session, mut guest) = session();
    assert!(pass_on(&session, &ToAgent::Signal(2)));
    assert_eq!(ToAgent::read(&mut guest).unwrap(), Some(ToAgent::Signal(2)));
}

/// Then the caller stops the machine.
#[test]
fn a_signal_does_not_wait_for_a_guest_that_reads_nothing() {
    let (session, guest) = session();
    let input = {
        let session = session.clone();
        thread::spawn(move || {
            let mut session = session.lock().unwrap();
            let stream = session.as_mut().unwrap();
            while ToAgent::Stdin(vec![0; 32 << 10]).write(stream).is_ok() {}
        })
    };
    // Until the thread has the session and fills it.
    while !matches!(session.try_lock(), Err(TryLockError::WouldBlock)) {
        thread::yield_now();
    }
    let started = Instant::now();
    assert!(!pass_on(&session, &ToAgent::Signal(2)));
    assert!(started.elapsed() < INPUT + Duration::from_secs(5));
    drop(guest);
    input.join().unwrap();
}

#[test]
fn a_full_stream_has_no_room_for_a_signal() {
    let (session, _guest) = session();
    {
        let mut session = session.lock().unwrap();
        let stream = session.as_mut().unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 4096]).is_ok() {}
        stream.set_nonblocking(false).unwrap();
    }
    assert!(!pass_on(&session, &ToAgent::Signal(2)));
}

#[test]
fn a_guest_that_does_not_say_that_it_is_ready_has_until_the_deadline() {
    let (ours, _silent) = UnixStream::pair().unwrap();
    let started = Instant::now();
    assert!(read_ready(ours, started + Duration::from_millis(50)).is_err());
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn any_exit_of_the_guest_is_a_status() {
    let (ours, mut guest) = UnixStream::pair().unwrap();
    FromAgent::Exit(Exit::Signal(i32::MAX)).write(&mut guest).unwrap();
    assert_eq!(copy_output(&ours).unwrap(), 255);
}
