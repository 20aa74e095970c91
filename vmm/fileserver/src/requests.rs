//! FUSE requests: from a descriptor chain to the file system and back.

use std::io::Write;
use std::mem::size_of;

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::server::Server;
use vm_memory::ByteValued;

use crate::ring::{Chain, Memory};

/// Answers one request: how many bytes were written. A request that cannot be read is answered with an error, or with
/// nothing where there is no room for that.
pub(crate) fn serve<F: FileSystem + Sync>(
    server: &Server<F>,
    memory: &Memory,
    chain: Chain,
) -> u32 {
    let reader = Reader::new(memory, chain.clone());
    let (Ok(reader), Ok(writer)) = (reader, Writer::new(memory, chain)) else {
        return 0;
    };
    let Ok(header) = reader.clone().read_obj::<InHeader>() else {
        return 0;
    };
    let unanswered = [Opcode::Forget as u32, Opcode::BatchForget as u32];
    let is_answered = !unanswered.contains(&header.opcode);
    if is_answered && writer.available_bytes() < size_of::<OutHeader>() {
        return 0;
    }
    let mut failed = writer.clone();
    match server.handle_message(reader, writer, None::<&mut ()>) {
        Ok(len) => len as u32,
        Err(_) if is_answered => {
            let len = size_of::<OutHeader>() as u32;
            let answer = OutHeader {
                len,
                error: -libc::EINVAL,
                unique: header.unique,
            };
            failed.write_all(answer.as_slice()).map_or(0, |()| len)
        }
        Err(_) => 0,
    }
}
