//! The program; everything is in the library.

fn main() -> std::process::ExitCode {
    // First of all: a launcher has to be the one thread of its process.
    codesandbox::runtime::embedded::run_if_asked();
    codesandbox::cli::main()
}
