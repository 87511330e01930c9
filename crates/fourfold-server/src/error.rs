//! Errors in OpenAI's JSON shape.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use fourfold_infer::InferError;
use fourfold_infer::engine::SubmitError;
use serde_json::{Value, json};

/// What a client is told. It names nothing of the machine.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    /// The field of the request that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None }
    }

    /// The request cannot be understood.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A field of the request is wrong.
    pub fn param(name: impl Into<String>, message: impl std::fmt::Display) -> Self {
        let name = name.into();
        Self { param: Some(name.clone()), ..Self::bad_request(format!("{name}: {message}")) }
    }

    /// No key, or a wrong one.
    pub fn unauthorized() -> Self {
        let message = "an API key is needed: Authorization: Bearer KEY";
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// Another model than the one that is served.
    pub fn unknown_model(name: &str) -> Self {
        let message = format!("the model {name:?} is not served here; GET /v1/models lists what is");
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { param: Some("model".to_owned()), code: Some("model_not_found"), ..error }
    }

    /// Nothing is at this address.
    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "there is nothing at this address")
    }

    /// The address takes other methods.
    pub fn wrong_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "this address does not take this method")
    }

    /// The body is larger than allowed.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than the {limit} bytes allowed");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// The client did not send its request in time.
    pub fn too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "the request did not arrive in time")
    }

    /// The answer did not end in time.
    pub fn out_of_time() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", "the answer took longer than the server allows")
    }

    /// As many requests as may wait.
    pub fn busy() -> Self {
        let message = "too many requests are waiting; try again later";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("queue_full"), ..error }
    }

    /// The server is about to end.
    pub fn shutting_down() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", "the server is shutting down")
    }

    /// A mistake of ours, or a broken model.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The object below `error`.
    pub fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }

    /// Its HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let headers = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        let mut response = (self.status, headers, self.body().to_string()).into_response();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<InferError> for ApiError {
    fn from(error: InferError) -> Self {
        match error {
            InferError::ContextFull { tokens, context } => {
                let message = format!("the prompt has {tokens} tokens; this server's context is {context}");
                Self { code: Some("context_length_exceeded"), ..Self::bad_request(message) }
            }
            InferError::EmptyPrompt | InferError::TokenOutOfRange { .. } | InferError::Template(_) => {
                Self::bad_request(error.to_string())
            }
            other => Self::internal(other.to_string()),
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { .. } => Self::busy(),
            SubmitError::Closed => Self::shutting_down(),
            SubmitError::Invalid(error) => error.into(),
        }
    }
}
