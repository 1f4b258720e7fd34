"""Classify the frames of a camera or a video: python camera.py ARTIFACT [SOURCE] [FRAMES]

SOURCE is a camera's number (0) or a video file. Needs OpenCV: pip install 'vitkit[video]'.
"""

import sys

import cv2

import vitkit


def main(artifact: str, source: str = "0", frames: str = "100") -> None:
    camera = cv2.VideoCapture(int(source) if source.isdigit() else source)
    with vitkit.open_engine(artifact, task="classification", threads=2) as engine:
        for _ in range(int(frames)):
            there_is_one, frame = camera.read()
            if not there_is_one:
                break
            # OpenCV's frames are BGR; the engine takes RGB.
            result = engine(frame[..., ::-1])
            print(f"{result.label}: {result.probability:.0%}")
    camera.release()


if __name__ == "__main__":
    main(*sys.argv[1:])
