//! A stream to a container's first process past its engine, whose relay (a shim or conmon, then the service) takes more
//! time than most runs: where that process is on this host, and this one may take a descriptor of it.
//!
//! The process makes a pair of sockets, tells over the engine's stream which descriptor is for us, and sends a token
//! through the other. Where the token is what that descriptor gives, they belong together, whatever namespace the
//! process's number is of. From the end of the direct stream on the process listens to the engine's again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::RecvFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use super::Duplex;

const TOKEN_BYTES: usize = 16;

/// What the process tells of a descriptor that is for us.
#[derive(Debug)]
pub(super) struct Offer {
    number: u8,
    token: [u8; TOKEN_BYTES],
}

impl Offer {
    pub(super) async fn read(engine: &mut Duplex) -> io::Result<Offer> {
        let number = engine.read_u8().await?;
        let mut token = [0; TOKEN_BYTES];
        engine.read_exact(&mut token).await?;
        Ok(Offer { number, token })
    }

    /// Takes the descriptor from the process, which needs the right to trace it.
    ///
    /// # Errors
    /// Of pidfd_open(2) and pidfd_getfd(2), or where the process is another one.
    pub(super) fn take(&self, pid: i32) -> io::Result<UnixStream> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("the engine tells no process"))?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let socket = pidfd_getfd(&process, self.number.into(), PidfdGetfdFlags::empty())?;
        let theirs = || io::Error::other("the process that the engine tells is another one in here");
        // First a look, lest a stranger's socket lose what it holds.
        if read_token(&socket, RecvFlags::PEEK)? != self.token
            || read_token(&socket, RecvFlags::empty())? != self.token
        {
            return Err(theirs());
        }
        let socket = net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        UnixStream::from_std(socket)
    }
}

fn read_token(socket: &OwnedFd, flags: RecvFlags) -> io::Result<[u8; TOKEN_BYTES]> {
    let mut token = [0; TOKEN_BYTES];
    let _ = rustix::net::recv(socket.as_fd(), &mut token, flags | RecvFlags::DONTWAIT)?;
    Ok(token)
}

/// The direct stream, with the engine's, which brings what the process writes to its stderr.
pub(super) struct Direct {
    stream: UnixStream,
    /// `None` once it has ended: of a restarted engine, which is no end of the conversation.
    engine: Option<Duplex>,
}

impl Direct {
    pub(super) fn new(stream: UnixStream, engine: Duplex) -> Direct {
        Direct { stream, engine: Some(engine) }
    }

    /// Hears what is said on stderr; on stdout nothing is any more. Ready once the engine's stream has ended.
    fn hear_engine(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut bytes = [0; 64];
        while let Some(engine) = &mut self.engine {
            let mut buffer = ReadBuf::new(&mut bytes);
            match ready!(Pin::new(engine).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                _ => self.engine = None,
            }
        }
        Poll::Ready(())
    }
}

impl AsyncRead for Direct {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let has_ended = match &read {
            Poll::Pending => false,
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
        };
        match read {
            Poll::Ready(_) if !has_ended => read,
            _ => {
                let heard = self.hear_engine(context);
                // A process that has ended may have said why: its last words are told by then.
                if has_ended && heard.is_pending() { Poll::Pending } else { read }
            }
        }
    }
}

impl AsyncWrite for Direct {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::pin::pin;

    use futures_util::poll;
    use tokio::io::AsyncWriteExt;

    use super::*;

    const TOKEN: [u8; TOKEN_BYTES] = [7; TOKEN_BYTES];

    fn own_pid() -> i32 {
        std::process::id() as i32
    }

    /// What a process does that offers a stream: it keeps one end, and the other is for who takes it.
    fn offered() -> (net::UnixStream, net::UnixStream, Offer) {
        let (own, other) = net::UnixStream::pair().unwrap();
        io::Write::write_all(&mut &own, &TOKEN).unwrap();
        let offer = Offer { number: other.as_raw_fd().try_into().unwrap(), token: TOKEN };
        (own, other, offer)
    }

    #[tokio::test]
    async fn a_descriptor_is_taken_from_the_process_that_offers_it() {
        let (own, other, offer) = offered();
        let mut taken = offer.take(own_pid()).unwrap();
        drop(other);
        taken.write_all(b"hi").await.unwrap();
        drop(taken);
        let mut heard = String::new();
        io::Read::read_to_string(&mut &own, &mut heard).unwrap();
        assert_eq!(heard, "hi", "and its end is seen");
    }

    #[tokio::test]
    async fn another_process_is_told_apart_and_loses_nothing() {
        let (_own, other, offer) = offered();
        let wrong = Offer { token: [8; TOKEN_BYTES], ..offer };
        assert!(wrong.take(own_pid()).unwrap_err().to_string().contains("another one"));
        let mut left = [0; TOKEN_BYTES];
        io::Read::read_exact(&mut &other, &mut left).unwrap();
        assert_eq!(left, TOKEN);
        assert!(wrong.take(own_pid()).is_err(), "which is silent");
        assert!(Offer { number: 255, ..wrong }.take(own_pid()).is_err(), "has no such descriptor");
        assert!(offer.take(0).is_err(), "which the engine does not know");
    }

    #[tokio::test]
    async fn the_end_waits_for_the_last_words() {
        let (stream, process) = UnixStream::pair().unwrap();
        let (engine, mut container) = tokio::io::duplex(64);
        let mut direct = Direct::new(stream, Box::new(engine));
        drop(process);
        let mut byte = [0];
        let mut read = pin!(direct.read(&mut byte));
        assert!(poll!(&mut read).is_pending());
        container.write_all(b"words").await.unwrap();
        assert!(poll!(&mut read).is_pending());
        drop(container);
        assert_eq!(read.await.unwrap(), 0);
    }

    #[tokio::test]
    async fn an_engine_that_ends_is_no_end() {
        let (stream, mut process) = UnixStream::pair().unwrap();
        let (engine, container) = tokio::io::duplex(64);
        let mut direct = Direct::new(stream, Box::new(engine));
        drop(container);
        let mut byte = [0];
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), direct.read(&mut byte)).await;
        assert!(early.is_err(), "nothing was said yet");
        process.write_all(b"x").await.unwrap();
        assert_eq!(direct.read(&mut byte).await.unwrap(), 1);
    }
}
