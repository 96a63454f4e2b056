# Two stages, so that the image contains few build tools. TORCH is `cpu` or the name of a CUDA build, such as `cu128`.
# EXTRAS are extras of pyproject.toml: the compose file's monitor needs `flower`, stores on S3 need `s3`, and some base
# models need `unidic-lite`.
FROM python:3.11.13-bookworm AS build
ARG TORCH=cpu
ARG EXTRAS="flower s3 unidic-lite"
ENV PATH=/venv/bin:$PATH
WORKDIR /src
# Layers that rarely change come first, so that a change of the code takes seconds: torch, then the other dependencies.
RUN python -m venv /venv \
    && pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" "torch==2.13.*"
COPY pyproject.toml ./
RUN python -c "import os, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; print('\n'.join(project['dependencies'] + [line for name in os.environ['EXTRAS'].split() for line in extras[name]]))" > needed.txt \
    && pip install --no-cache-dir -r needed.txt
COPY README.md LICENSE ./
COPY db db
COPY training training
COPY worker worker
RUN pip install --no-cache-dir --no-deps .

FROM python:3.11.13-slim-bookworm
ARG TORCH=cpu
# The engine `compiled` of a GPU needs a C compiler.
# hadolint ignore=DL3008
RUN if [ "$TORCH" != cpu ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
ENV PATH=/venv/bin:$PATH TWEETSCORE_HOME=/data
# New volumes get the owner of these folders. The image contains no models: they come from a store or the hub.
RUN useradd --uid 10001 --create-home tweetscore && install -d -o tweetscore /data /models
COPY --from=build /venv /venv
USER 10001
CMD ["tweetscore", "doctor"]
