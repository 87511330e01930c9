//! An HTTP server over a model: OpenAI's API, what DeepSeek's own adds to it, llama.cpp's small helpers, and a chat page.
//!
//! `engine` in `fourfold-infer` computes; this crate speaks HTTP and knows the shapes of requests and answers. It opens no
//! file and prints nothing.

mod answer;
mod app;
mod body;
mod chat;
mod completions;
mod connection;
mod conversation;
mod embeddings;
mod error;
mod fields;
mod grammar;
mod info;
mod reply;
mod run;
mod sampling;
mod scan;
mod state;
mod tokens;
mod tools;
pub mod untrusted;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

pub use answer::{AnswerText, Delta};
pub use error::ApiError;
pub use state::{Limits, Served};
pub use tools::{ToolCall, ToolFormat};

/// Serves a model on an address until `shutdown` is ready; `listening` is told the address that was taken (a port of 0
/// takes any). Returns when running answers have ended, or their time is up.
///
/// # Errors
/// The address cannot be had, or the system gives no threads.
pub fn serve(
    served: Served,
    limits: Limits,
    address: SocketAddr,
    listening: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    // Requests are small work: two threads leave the others to the kernels.
    // tokio panics where the system gives it no thread.
    let start = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = fourfold_infer::guarded("tokio", start).map_err(std::io::Error::other)??;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await?;
        listening(listener.local_addr()?);
        let state = state::State::new(served, limits);
        connection::serve(listener, app::router(std::sync::Arc::clone(&state)), state, shutdown).await;
        Ok::<(), std::io::Error>(())
    })?;
    // Answers that did not end in time are dropped with their listeners, which ends their computation.
    runtime.shutdown_background();
    Ok(())
}

/// Waits without holding up the server: for a `shutdown` that looks from time to time.
pub async fn sleep(time: Duration) {
    tokio::time::sleep(time).await;
}
