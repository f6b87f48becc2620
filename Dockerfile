# authbackend as a container: not root, and nothing in it that the service does not need.
#   docker build --tag authbackend .
#   docker run --rm authbackend --help
# What it needs to serve: AUTHBACKEND_DATABASE__DSN and the three AUTHBACKEND_BROKER__TLS__... files. See docs/operations.md.
#
# A release names the base image by its digest, and says what it was built from:
#   docker build --build-arg BASE=python:3.13-slim@sha256:... --build-arg VERSION=0.1.0 \
#     --build-arg REVISION=$(git rev-parse HEAD) --build-arg CREATED=$(date --utc +%Y-%m-%dT%H:%M:%SZ) .

ARG BASE=python:3.13-slim
FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
# Every package in the version and with the digest that requirements/ holds: another file under the same name is refused.
COPY requirements ./requirements
# What packs it, and what lists its parts; in an environment that stays behind in this stage.
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --only-binary :all: --require-hashes --requirement requirements/build.lock
# Without pip inside: what is copied from here to the image below can run authbackend and install nothing.
RUN python -m venv --without-pip /opt/authbackend
# Dependencies first: this layer is kept while only the code changes.
# --only-binary: wheels alone, so that no compiler is ever needed, and a missing wheel is an error here.
RUN /opt/build/bin/pip --python /opt/authbackend/bin/python install --only-binary :all: --require-hashes \
      --requirement requirements/service.lock
# The package itself; pyproject.toml puts sql/ and the manual page inside it.
COPY pyproject.toml README.md LICENSE ./
COPY authbackend ./authbackend
COPY authbackend_load ./authbackend_load
COPY sql ./sql
COPY docs/authbackend.1 ./docs/authbackend.1
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheels . \
 && /opt/build/bin/pip --python /opt/authbackend/bin/python install --no-deps /tmp/wheels/authbackend-*.whl \
 && /opt/authbackend/bin/authbackend --version
# The parts list (SBOM) of what is installed, CycloneDX. The packages of the base image are in that image's own.
RUN /opt/build/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
      --output-format JSON --output-file /tmp/sbom.cdx.json /opt/authbackend/bin/python

FROM ${BASE}
ARG VERSION=unreleased
ARG REVISION=unknown
ARG CREATED=unknown
ARG BASE
LABEL org.opencontainers.image.title="authbackend" \
      org.opencontainers.image.description="Device authentication and authorization for RabbitMQ" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
COPY deploy/healthcheck /usr/local/bin/healthcheck
# A number as well as a name, so that Kubernetes can check runAsNonRoot. It owns nothing but the places
# for a copy of the registry and for the revocation lists of `crl sync`, which a volume mounted there takes over.
RUN groupadd --gid 10001 authbackend \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin authbackend \
 && install --directory --owner=10001 --group=10001 --mode=700 /var/lib/authbackend \
 && install --directory --owner=10001 --group=10001 --mode=755 /crl \
 && chmod 755 /usr/local/bin/healthcheck
COPY --from=build /opt/authbackend /opt/authbackend
COPY --from=build /tmp/sbom.cdx.json /usr/share/doc/authbackend/sbom.cdx.json
# USER: the commands note who acts, and must have a name to note under any user id.
ENV PATH=/opt/authbackend/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=authbackend \
    AUTHBACKEND_BROKER__LISTEN=0.0.0.0:8080 \
    AUTHBACKEND_HEALTH__LISTEN=0.0.0.0:8082
USER 10001:10001
# 8080: RabbitMQ asks here; refuses to start without mutual TLS. 8082: health, metrics and revocation lists, for balancers,
# Prometheus and brokers' hosts; keep it inside. The listener for people (8081) stays on the container's loopback.
EXPOSE 8080 8082
# "Live", not "ready": a database that is away makes no container sick; whoever spreads the load looks at /health/ready.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-I", "-S", "/usr/local/bin/healthcheck"]
ENTRYPOINT ["authbackend"]
CMD ["serve"]
