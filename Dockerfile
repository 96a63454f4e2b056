FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY db db
COPY training training
COPY worker worker
RUN pip install --no-cache-dir . && useradd --create-home tweetscore && install -d -o tweetscore /data
USER tweetscore
ENV TWEETSCORE_HOME=/data
CMD ["tweetscore", "doctor"]
