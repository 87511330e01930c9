//! The addresses and what stands before them: the key, CORS, counting.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State as Extract};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::Value;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tower_http::cors::CorsLayer;

use crate::embeddings::base64;
use crate::state::State;
use crate::{ApiError, body, chat, completions, embeddings, info, reply, tokens};

type Shared = Extract<Arc<State>>;

/// All addresses.
pub fn router(state: Arc<State>) -> Router {
    let mut open = Router::new().route("/health", get(|| async { info::health() }));
    open = open.route("/v1/health", get(|| async { info::health() }));
    if state.limits.page {
        let policy = HeaderValue::from_str(&content_policy()).unwrap_or(HeaderValue::from_static("default-src 'none'"));
        open = open.route("/", get(|| async move { page(&policy) }));
    }
    let mut closed = Router::new()
        .route("/props", get(|s: Shared| async move { info::props(&s) }))
        .route("/tokenize", post(|s: Shared, b: Body| async move { tokens::tokenize(&s, &json(&s, b).await?) }))
        .route("/detokenize", post(|s: Shared, b: Body| async move { tokens::detokenize(&s, &json(&s, b).await?) }))
        .route(
            "/apply-template",
            post(|s: Shared, b: Body| async move { tokens::apply_template(&s, &json(&s, b).await?) }),
        );
    if state.limits.insight {
        closed = closed
            .route("/slots", get(|s: Shared| async move { info::slots(&s) }))
            .route("/metrics", get(|s: Shared| async move { info::metrics(&s) }));
    }
    // DeepSeek's own API has no prefix, and one for what is new.
    for prefix in ["/v1", "", "/beta"] {
        let at = |path: &str| format!("{prefix}{path}");
        closed = closed
            .route(&at("/models"), get(|s: Shared| async move { info::models(&s) }))
            .route(&at("/models/{*name}"), get(one_model))
            .route(
                &at("/chat/completions"),
                post(|Extract(s): Shared, b: Body| async move {
                    let body = json(&s, b).await?;
                    chat::complete(s, body).await
                }),
            )
            .route(
                &at("/completions"),
                post(|Extract(s): Shared, b: Body| async move {
                    let body = json(&s, b).await?;
                    completions::complete(s, body).await
                }),
            )
            .route(
                &at("/embeddings"),
                post(|Extract(s): Shared, b: Body| async move {
                    let body = json(&s, b).await?;
                    embeddings::embed(s, body).await
                }),
            );
    }
    let closed = closed.layer(middleware::from_fn_with_state(Arc::clone(&state), check_key));
    let mut app = open
        .merge(closed)
        .fallback(|| async { ApiError::not_found() })
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .layer(middleware::from_fn_with_state(Arc::clone(&state), count));
    if state.limits.any_origin {
        app = app.layer(CorsLayer::permissive());
    }
    app.with_state(state)
}

async fn json(state: &State, body: Body) -> Result<Value, ApiError> {
    body::json(body, state.limits.body_bytes, state.limits.client_time).await
}

async fn one_model(Extract(state): Shared, Path(name): Path<String>) -> Result<Response, ApiError> {
    if state.is_called(&name) {
        Ok(reply::json_response(&info::model(&state, &name)))
    } else {
        Err(ApiError::unknown_model(&name))
    }
}

/// The chat page: one file, nothing fetched from elsewhere.
const PAGE: &str = include_str!("page.html");

/// What a browser lets the page do: run its own style and script, known by their hashes, and talk with this server.
fn content_policy() -> String {
    let hash = |tag: &str| {
        let (begin, end) = (format!("<{tag}>"), format!("</{tag}>"));
        let inside =
            PAGE.split_once(&begin).and_then(|(_, rest)| rest.split_once(&end)).map_or("", |(inside, _)| inside);
        base64(&Sha256::digest(inside.as_bytes()))
    };
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("style"),
        hash("script")
    )
}

fn page(policy: &HeaderValue) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, policy.clone()),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    (headers, PAGE).into_response()
}

/// Lets through who shows the key. Its comparison takes the same time wherever keys differ.
async fn check_key(Extract(state): Shared, request: Request, next: Next) -> Response {
    let Some(key) = &state.limits.api_key else { return next.run(request).await };
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = shown.and_then(|value| value.strip_prefix("Bearer "));
    let shown = bearer.or_else(|| request.headers().get("x-api-key").and_then(|value| value.to_str().ok()));
    match shown {
        Some(shown) if bool::from(shown.as_bytes().ct_eq(key.as_bytes())) => next.run(request).await,
        _ => ApiError::unauthorized().into_response(),
    }
}

/// Counts what was answered with an error.
async fn count(Extract(state): Shared, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let counter = match response.status() {
        status if status.is_client_error() => Some(&state.refused[0]),
        StatusCode::OK => None,
        status if status.is_server_error() => Some(&state.refused[1]),
        _ => None,
    };
    if let Some(counter) = counter {
        counter.fetch_add(1, Ordering::Relaxed);
    }
    response
}
