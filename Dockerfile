# Two stages: what builds does not run. TORCH is `cpu`, or a CUDA build's name, such as `cu128`; EXTRAS are extras of
# pyproject.toml: the compose file's monitor needs `flower`, stores on S3 need `s3`, some base models `unidic-lite`.
FROM python:3.11.13-bookworm AS build
ARG TORCH=cpu
ARG EXTRAS="flower s3 unidic-lite"
ENV PATH=/venv/bin:$PATH
WORKDIR /src
# What changes seldom comes first, so that a change of ours costs seconds: torch, then all else that we need.
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
ENV PATH=/venv/bin:$PATH TWEETSCORE_HOME=/data
# Volumes take over whose their folders are. Models come from a store or the hub, never with the image.
RUN useradd --uid 10001 --create-home tweetscore && install -d -o tweetscore /data /models
COPY --from=build /venv /venv
USER 10001
CMD ["tweetscore", "doctor"]
