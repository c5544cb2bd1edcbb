//! The HTTP contract, on the real program over a real socket; what needs no Python, on the fake engine.

mod audit;
mod auth;
mod command_line;
mod containerfile;
mod files;
mod floors;
mod http;
mod image;
mod isolation;
mod lifecycle;
mod openapi;
mod phases;
mod probe;
mod sessions;
mod simulation;
mod supervisor;
mod support;
