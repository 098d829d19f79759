# syntax=docker/dockerfile:1

# The same Debian release as the final stage's, so that both have the same glibc.
FROM rust:1.95-slim-bookworm AS builder
# jemalloc is built by make; the C compiler that it and aws-lc need is in the image.
RUN apt-get update \
 && apt-get install -y --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
# Without rust-toolchain.toml (see .dockerignore): it asks for clippy and rustfmt, which rustup would download here.
COPY . .
# Without the embedded server of `spiegel dev` and `spiegel demo`.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --release --locked --no-default-features \
 && cp target/release/spiegel /usr/local/bin/spiegel

# glibc, libgcc, CA certificates, a user; no shell.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="spiegel" \
      org.opencontainers.image.description="Acts on CouchDB's changes: replicates the databases that changed and calls an HTTP API for the documents that changed." \
      org.opencontainers.image.licenses="MIT"
COPY --from=builder /usr/local/bin/spiegel /usr/local/bin/spiegel
# Loopback would be the container's own. /status answers on loopback only, so it is refused here.
ENV SPIEGEL_ADMIN_LISTEN=0.0.0.0:9595
EXPOSE 9595
# The numeric id, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 65532:65532
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 CMD ["/usr/local/bin/spiegel", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/spiegel"]
# As the variables of Node Spiegel's image say (TYPE, URL, …), or else `run`.
CMD ["container"]
