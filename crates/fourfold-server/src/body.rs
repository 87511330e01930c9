//! Bodies of requests: bounded in size and time.

use std::time::Duration;

use axum::body::Body;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;

use crate::ApiError;

/// The JSON of a body of at most `limit` bytes that arrives within `time`.
///
/// # Errors
/// It is larger, slower, or no JSON (invalid UTF-8 and more than 128 levels are none either).
pub async fn json(body: Body, limit: usize, time: Duration) -> Result<Value, ApiError> {
    let collected = match tokio::time::timeout(time, Limited::new(body, limit).collect()).await {
        Err(_) => return Err(ApiError::too_slow()),
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => return Err(ApiError::too_large(limit)),
        Ok(Err(_)) => return Err(ApiError::bad_request("the body ended before its end")),
        Ok(Ok(collected)) => collected,
    };
    serde_json::from_slice(&collected.to_bytes())
        .map_err(|e| ApiError::bad_request(format!("the body is no JSON: {e}")))
}
