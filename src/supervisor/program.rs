//! The program that is PID 1 of every sandbox, joined from the files of `program/`, whose map is `prelude.py`.

/// For `python3 -I -S`, as it is or compiled.
pub const SOURCE: &str = concat!(
    include_str!("program/prelude.py"),
    include_str!("program/encoding.py"),
    include_str!("program/frames.py"),
    include_str!("program/processes.py"),
    include_str!("program/source.py"),
    include_str!("program/outcome.py"),
    include_str!("program/extras.py"),
    include_str!("program/task.py"),
    include_str!("program/narrowed.py"),
    include_str!("program/guest.py"),
    include_str!("program/cell.py"),
    include_str!("program/forker.py"),
    include_str!("program/capture.py"),
    include_str!("program/run.py"),
    include_str!("program/kernel.py"),
    include_str!("program/listing.py"),
    include_str!("program/place.py"),
    include_str!("program/files.py"),
    include_str!("program/posture.py"),
    include_str!("program/supervisor.py"),
    include_str!("program/main.py"),
);

#[cfg(test)]
mod tests {
    #[test]
    fn every_part_is_joined() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/src/supervisor/program");
        let parts = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let size: u64 = parts.map(|part| part.metadata().unwrap().len()).sum();
        assert_eq!(size, super::SOURCE.len() as u64);
    }
}
